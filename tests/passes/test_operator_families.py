"""Passes know operators by family: its other spellings, overloads and rarer members are not missed.

Each of these was decided otherwise while every site kept a list of its own.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

from graphopt import capture
from graphopt.ir.operators import short_name
from graphopt.ir.program import Program
from graphopt.measure.cost import cost
from graphopt.passes.factorisation.factorised_layers import factorisable
from graphopt.passes.fold import Fold
from graphopt.passes.folding.no_ops import find_no_ops
from graphopt.passes.layers.recognition import Layers
from graphopt.passes.layers.weighted_call import weighted_call
from graphopt.passes.pruning.residual_sums import addend_of
from graphopt.passes.pruning.weight_criteria import scales
from graphopt.passes.quantization.kernels import clamp_range, kernel_of
from graphopt.passes.quantization.placement import place
from graphopt.passes.residuals.branches import find_branches
from graphopt.pipeline.context import Context
from tests.passes.int8_models import WITHOUT_COSTS, images, operators, quantized, reasons

X = torch.linspace(-2, 2, 32).reshape(4, 8)
MAPS = torch.linspace(-2, 2, 4 * 3 * 6 * 6).reshape(4, 3, 6, 6)


class Calls(nn.Module):
    """A function of the model's layers."""

    def __init__(self, function: object, **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def captured(function: object, x: Tensor = X, **layers: nn.Module | nn.Parameter) -> Program:
    torch.manual_seed(0)
    return capture(Calls(function, **layers), x)


def node_of(program: Program, name: str) -> fx.Node:
    return next(node for node in program.graph.nodes if short_name(node) == name)


def folded(program: Program) -> Program:
    ctx = Context(original=program)
    return Fold().apply(program, Fold().plan(program, ctx))


@pytest.mark.parametrize("mode", ["floor", "trunc"])
def test_fold_keeps_a_division_that_rounds(mode: str) -> None:
    program = captured(lambda _, x: torch.div(-x, 1, rounding_mode=mode))
    found, refused = find_no_ops(program)
    assert [name for name in found if not name.startswith("to")] == refused == []  # a cast to what it is guards `trunc`
    torch.testing.assert_close(folded(program)(X), torch.div(-X, 1, rounding_mode=mode))


def test_fold_keeps_a_pool_that_divides() -> None:
    program = captured(lambda _, x: nn.functional.avg_pool2d(-x, 1, divisor_override=4), MAPS)
    assert find_no_ops(program) == ([], [])
    torch.testing.assert_close(folded(program)(MAPS), -MAPS / 4)


@pytest.mark.parametrize(
    "function",
    [
        lambda _, x: torch.multiply(x, 1) + 1,
        lambda _, x: torch.subtract(x, 0) + 1,
        lambda _, x: torch.true_divide(x, 1) + 1,
        lambda _, x: torch.concat([x]) + 1,
        lambda _, x: x.narrow(1, 0, 8) + 1,
        lambda _, x: x.broadcast_to(x.shape) + 1,
        lambda _, x: torch.movedim(x, 0, 0) + 1,
    ],
)
def test_fold_drops_what_does_nothing_in_other_words(function: object) -> None:
    program = captured(function)
    assert len(find_no_ops(program)[0]) == 1
    torch.testing.assert_close(folded(program)(X), X + 1)


def test_fold_takes_scales_in_other_words_through_reorderings_into_the_layer() -> None:
    factor = nn.Parameter(torch.linspace(0.5, 1.5, 3))

    def scaled(model: Calls, x: Tensor) -> Tensor:
        moved = torch.movedim(model.conv(x), 1, -1).clone()
        return torch.subtract(torch.multiply(moved, model.factor), model.factor)

    program = captured(scaled, MAPS, conv=nn.Conv2d(3, 3, 1), factor=factor)
    result = folded(program)
    left = [short_name(node) for node in result.graph.nodes if node.op == "call_function"]
    assert "multiply" not in left
    assert "subtract" not in left
    torch.testing.assert_close(result(MAPS), program(MAPS))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv2d(3, 3, 1, padding="valid"), MAPS),
        (nn.Linear(8, 8), X),
    ],
)
def test_svd_says_that_a_weight_is_computed(layer: nn.Module, x: Tensor) -> None:
    normed = parametrizations.weight_norm(layer)
    found, refusals = factorisable(captured(lambda model, x: model.layer(x), x, layer=normed).graph_module, ())
    assert found == []
    assert [refusal.reason.startswith("its weight is computed") for refusal in refusals] == [True]


def test_svd_says_that_the_weight_of_an_addmm_is_computed() -> None:
    weight, bias = nn.Parameter(torch.rand(8, 4)), nn.Parameter(torch.rand(4))
    program = captured(lambda m, x: torch.addmm(m.bias, x, m.weight.tanh()), weight=weight, bias=bias)
    refusals = factorisable(program.graph_module, ())[1]
    assert [refusal.reason.startswith("its weight is computed") for refusal in refusals] == [True]


def test_int8_reads_other_spellings_as_the_kernels_they_are() -> None:
    program = captured(lambda _, x: torch.clip(torch.multiply(torch.concat([x, x]), x.repeat(2, 1)), 0, 6))
    names = {kernel.name for node in program.graph.nodes if (kernel := kernel_of(node, program.graph_module))}
    assert {"cat", "mul", "clamp"} <= names
    assert clamp_range(node_of(program, "clip")) == (0.0, 6.0)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda m, x: torch.tensordot(x, m.weight, 1), "tensordot"),
        (lambda m, x: torch.inner(x, m.weight), "inner"),
        (lambda m, x: torch.mv(x, m.weight[0]), "mv"),
        (lambda m, x: torch.addbmm(x[:, :4], x[None], m.weight[None, :, :4]), "addbmm"),
        (lambda m, x: torch.gru_cell(x, x, m.wide, m.wide), "gru_cell"),
    ],
)
def test_int8_reports_heavy_work_without_a_kernel(function: object, name: str) -> None:
    weight, wide = nn.Parameter(torch.rand(8, 8)), nn.Parameter(torch.rand(24, 8))
    program = captured(function, weight=weight, wide=wide)
    reasons = [refusal.reason for refusal in place(program.graph_module, WITHOUT_COSTS).refusals]
    assert f"`{name}` has no integer kernel on onnxruntime" in reasons


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.tensordot(x, m.weight, 1),
        lambda m, x: torch.inner(x, m.weight),
        lambda m, x: torch.gru_cell(x, x, m.wide, m.wide),
    ],
)
def test_blocks_are_found_whatever_product_makes_them(function: object) -> None:
    weight, wide = nn.Parameter(torch.rand(8, 8)), nn.Parameter(torch.rand(24, 8))

    def block(model: Calls, x: Tensor) -> Tensor:
        return torch.subtract(x, function(model, x.tanh()))

    layers = {"first": nn.Linear(8, 8), "last": nn.Linear(8, 2), "weight": weight, "wide": wide}
    program = captured(lambda m, x: m.last(block(m, m.first(x))), **layers)
    branches, _ = find_branches(program.graph_module)
    assert len(branches) == 1
    known = Layers(program.graph_module)
    assert any(node in known for node in branches[0].nodes)


@pytest.mark.parametrize("drop", [nn.functional.feature_alpha_dropout, nn.functional.alpha_dropout])
def test_prune_follows_a_layer_to_its_sum_past_any_dropout(drop: object) -> None:
    program = captured(lambda m, x: x + drop(m.linear(x), 0.5, False).detach(), linear=nn.Linear(8, 8))
    call = weighted_call(node_of(program, "linear"), program.graph_module)
    assert call is not None
    found = addend_of(call, program.graph_module)
    assert found is not None
    torch.testing.assert_close(found.factor, torch.ones(8, dtype=torch.float64))


def test_prune_knows_a_scale_in_other_words_and_no_scale_by_its_name() -> None:
    gain = nn.Parameter(torch.rand(8))
    program = captured(lambda m, x: torch.multiply(m.linear(x), m.gain), linear=nn.Linear(8, 8), gain=gain)
    assert scales(program.graph_module) == {"gain"}


def test_another_librarys_operator_of_the_same_name_is_none_of_the_family() -> None:
    library = torch.library.Library("graphopt_test_families", "FRAGMENT")
    library.define("linear(Tensor input, Tensor weight) -> Tensor")
    library.impl("linear", lambda x, weight: x * weight.sum(), "CompositeExplicitAutograd")
    library.impl("linear", lambda x, weight: torch.empty_like(x), "Meta")
    own = torch.ops.graphopt_test_families.linear
    program = captured(lambda m, x: own(x, m.weight), weight=nn.Parameter(torch.rand(8, 8)))
    node = node_of(program, "linear")
    kernel = kernel_of(node, program.graph_module)
    assert kernel is not None
    assert kernel.name == "graphopt_test_families::linear"
    assert place(program.graph_module, WITHOUT_COSTS).sites == []
    library._destroy()


def test_recurrent_layers_are_counted_whatever_way_they_are_called() -> None:
    program = captured(lambda m, x: m.gru(x[:, None])[0], gru=nn.GRU(8, 4))
    assert cost(program).flops == 2 * 3 * 4 * (8 + 4)


class Spelled(nn.Module):
    """A small network, in the usual words or in others."""

    def __init__(self, *, usual: bool) -> None:
        super().__init__()
        self.usual = usual
        self.one, self.two, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.one(x), self.two(x)
        if self.usual:
            return self.last(torch.cat([torch.clamp(one, 0, 6), two * torch.sigmoid(two)], 1))
        return self.last(torch.concat([torch.clip(one, 0, 6), torch.multiply(two, torch.sigmoid(two))], 1))


def test_int8_makes_the_same_of_other_words() -> None:
    x = images(size=8)
    usual, other = (quantized(Spelled(usual=usual), x) for usual in (True, False))
    counts = operators(other[0])
    assert operators(usual[0])["quantize"] == counts["quantize"]
    assert counts["clip"] == 0, "the range of the integers carries it out"
    torch.testing.assert_close(other[0](x), usual[0](x), rtol=0, atol=0)
    assert reasons(other[1]) == reasons(usual[1]) == {}
