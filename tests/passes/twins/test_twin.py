"""The twin of a quantized program: it computes the same to the bit, trains, and what it learned goes back exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.backends.onnxruntime.description import DESCRIPTION
from graphopt.backends.tensorrt.description import DESCRIPTION as TENSORRT
from graphopt.capturing.capture import capture
from graphopt.distillation.weights import overwrite
from graphopt.ir.program import Program
from graphopt.passes.codebook import Codebook, CodebookOptions
from graphopt.passes.int8 import Int8Options
from graphopt.passes.svd import Svd, SvdOptions
from graphopt.passes.twins.codes import find_lookups
from graphopt.passes.twins.twin import Twin, twin_of
from graphopt.passes.weights import Weights, WeightsOptions
from graphopt.pipeline.context import Context
from graphopt.pipeline.pass_base import Pass
from graphopt.quantization.ops import DYNAMIC_QUANTIZE, FAKE_QUANTIZE, step_gain
from graphopt.testing import TensorSamples
from tests.passes.int8_models import (
    EDGES,
    IDS,
    HardActivations,
    Head,
    Perceptron,
    Tokens,
    TwoConvs,
    edge,
    folded,
    images,
    noise,
    quantized,
)
from tests.passes.test_int8_lstm import Tagger


def by_weights(model: nn.Module, data: Tensor, **options: object) -> tuple[Program, Program]:
    program = folded(model, data)
    ctx = Context(original=program, target=DESCRIPTION, samples=TensorSamples((data,)))
    pass_ = Weights(WeightsOptions(**options))  # type: ignore[arg-type]
    return program, pass_.apply(program, pass_.plan(program, ctx))


def results(program: Program, data: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return program.call_flat((data,))


def shaken(twin: Twin) -> dict[str, Tensor]:
    """Return tensors of a twin as training might leave them."""
    generator = torch.Generator().manual_seed(0)
    known = dict(twin.program.graph_module.named_parameters())
    return {
        name: one.detach() * (1 + 0.05 * torch.randn(one.shape, generator=generator)) for name, one in known.items()
    }


def check(floating: Program, stored: Program, data: Tensor) -> Twin:
    """Check that a twin computes what the stored program does, has a gradient everywhere, and gives back what it is."""
    twin = twin_of(stored, floating, floating, learn_steps=True)
    for found, wanted in zip(results(twin.program, data), results(stored, data), strict=True):
        assert torch.equal(found, wanted)
    assert twin.stored({}) == {}
    own = twin.program.copy(share_tensors=False)
    torch.stack([part.square().sum() for part in own.call_flat((data,))]).sum().backward()  # type: ignore[no-untyped-call]
    gradients = {name: one.grad for name, one in own.graph_module.named_parameters()}
    fixed = {f"{one.stem}.table" for one in twin.lookups.values() if one.signs(stored.graph_module)}
    assert {name for name, gradient in gradients.items() if gradient is None} == fixed
    assert all(bool(gradients[name].isfinite().all()) for name in gradients.keys() - fixed)  # type: ignore[union-attr]
    assert all(bool(gradients[name].any()) for name in (*twin.integers, *twin.lookups))  # type: ignore[union-attr]
    trained = {name: one for name, one in shaken(twin).items() if name not in fixed}
    overwrite(own, trained)
    result = stored.copy(share_tensors=False)
    overwrite(result, twin.stored(trained))
    for found, wanted in zip(results(result, data), results(own, data), strict=True):
        assert torch.equal(found, wanted)
    return twin


@pytest.mark.parametrize(("model", "data"), [edge[:2] for edge in EDGES], ids=lambda one: getattr(one, "__name__", ""))
def test_of_every_placement_of_int8(model: type[nn.Module], data: Tensor) -> None:
    program = edge(model)
    stored, _ = quantized(program, data)
    check(program, stored, data)


def test_for_a_target_of_symmetric_integers_and_with_dynamic_scales() -> None:
    program = folded(TwoConvs(), images())
    stored, _ = quantized(program, images(), target=TENSORRT)
    check(program, stored, images())
    program = folded(Perceptron(), noise(16, 8))
    stored, _ = quantized(program, noise(16, 8), options=Int8Options(mode="dynamic"))
    assert any(node.target is DYNAMIC_QUANTIZE for node in stored.graph.nodes)
    check(program, stored, noise(16, 8))


@pytest.mark.parametrize(
    "options",
    [{"bits": 8, "block": 0}, {"bits": 4, "block": 16}, {"bits": 3}, {"bits": 2, "symmetric": False},
     {"bits": 4, "symmetric": False, "block": 16}],
    ids=str,
)  # fmt: skip
def test_of_weights_alone(options: dict[str, object]) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(40, 64), nn.Linear(64, 32, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu())

    program, stored = by_weights(Wide(), noise(16, 40), **options)
    twin = check(program, stored, noise(16, 40))
    assert [one.high - one.low for one in twin.integers.values()] == [(1 << int(str(options["bits"]))) - 1] * 2


def test_of_tables_of_rows_that_a_product_shares() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.body = nn.Embedding(600, 32), nn.Linear(32, 32)

        def forward(self, ids: Tensor) -> Tensor:
            return self.body(self.table(ids)) @ self.table.weight.t()

    ids = torch.randint(0, 600, (8, 5), generator=torch.Generator().manual_seed(0))
    program, stored = by_weights(Tied(), ids, bits=4)
    check(program, stored, ids)
    stored, plan = quantized(program, ids)
    assert plan.tables
    check(program, stored, ids)


def test_weights_start_where_they_were_as_near_as_rounds_to_their_integers() -> None:
    program = folded(TwoConvs(), images())
    stored, _ = quantized(program, images(), options=Int8Options(weight_bits=3))
    twin = twin_of(stored, program, program, learn_steps=True)
    known, before = twin.program.state_dict(), program.state_dict()
    for name in ("a", "b"):
        start, wanted = known[f"{name}.weight_int8_real"], before[f"{name}.weight"]
        step = known[f"{name}.weight_int8_scale"].reshape(-1, 1, 1, 1)
        assert float(((start - wanted).abs() / step).max()) < 2e-3  # at the edges of what rounds to an integer
    without = twin_of(stored, None, program, learn_steps=True).program.state_dict()["a.weight_int8_real"]
    assert bool(((without / known["a.weight_int8_scale"].reshape(-1, 1, 1, 1)) % 1 == 0).all())


def test_the_range_is_that_of_the_bits_asked_for(tmp_path: Path) -> None:
    program = folded(TwoConvs(), images())
    stored, _ = quantized(program, images(), options=Int8Options(weight_bits=4))
    with torch.no_grad():
        stored.state_dict()["a.weight_int8"].fmod_(4)  # which uses less of it
    stored.save(tmp_path / "program.pt2")
    twin = twin_of(graphopt.load(tmp_path / "program.pt2"), program, program, learn_steps=True)
    assert {(one.low, one.high) for one in twin.integers.values()} == {(-7, 7)}
    rounded = twin.stored({name: 10 * one for name, one in twin.program.state_dict().items() if "_real" in name})
    assert all(int(one.abs().max()) == 7 for one in rounded.values())


def test_steps_are_learned_but_what_a_kernel_takes_for_given() -> None:
    stored, plan = quantized(HardActivations(), images())
    shifted = {record["value"] for record in plan.values if record["form"] == "hard_sigmoid"}
    twin = twin_of(stored, None, stored, learn_steps=True)
    assert shifted
    assert twin.shares
    assert not [name for name in twin.shares for value in shifted if name.startswith(f"int8_{value}.")]
    assert twin_of(stored, None, stored, learn_steps=False).shares == {}


def test_the_step_of_an_integer_bias_stays_that_of_its_product() -> None:
    program = folded(Head(), images())
    stored, _ = quantized(program, images())
    twin = twin_of(stored, program, program, learn_steps=True)
    found = twin.stored(shaken(twin))
    expected = found["int8_adaptive_avg_pool2d_default.scale"] * found["linear.weight_int8_scale"]
    assert torch.equal(found["int8_linear.bias_scale"], expected)
    assert found["int8_linear.bias"].dtype is torch.int32


def test_a_weight_that_the_original_has_frozen_is_not_trained() -> None:
    model = TwoConvs()
    model.a.requires_grad_(False)
    program = folded(model, images())
    stored, _ = quantized(program, images())
    twin = twin_of(stored, program, program, learn_steps=True)
    assert [one.name for one in twin.integers.values()] == ["b.weight_int8"]
    assert "a.weight_int8_scale" not in twin.shares


@pytest.mark.parametrize(("frozen", "trained"), [("", 2), (".bias", 1), (".weight", 0)])
def test_a_layer_with_an_integer_bias_that_the_original_has_frozen_is_not_trained(frozen: str, trained: int) -> None:
    model = Head()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen and name.endswith(frozen)))
    program = folded(model, images())
    stored, _ = quantized(program, images())
    twin = twin_of(stored, program, program, learn_steps=True)
    own = dict(twin.program.graph_module.named_parameters())
    assert len({"linear.weight_int8_real", "int8_linear.bias_real"} & own.keys()) == trained
    assert ("linear.weight_int8_scale" in twin.shares) is (trained > 0)
    found = twin.stored(shaken(twin))
    x, w = (f"{name}scale" for name in ("int8_adaptive_avg_pool2d_default.", "linear.weight_int8_"))
    assert torch.equal(found["int8_linear.bias_scale"], found[x] * found.get(w, stored.state_dict()[w]))


def test_integers_of_a_bias_that_no_float32_holds_come_back_the_same() -> None:
    model = Head()
    stored, _ = quantized(model, images())
    with torch.no_grad():
        stored.state_dict()["int8_linear.bias"].copy_(torch.tensor([2**24 + 1, -(2**30) - 3, 7, 2**31 - 1, 0]))
    twin = twin_of(stored, None, stored, learn_steps=True)
    assert any(one.name == "int8_linear.bias" for one in twin.integers.values())
    assert twin.stored({}) == {}
    for found, wanted in zip(results(twin.program, images()), results(stored, images()), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("looked_up", [False, True])
def test_factors_of_a_weight_start_each_where_it_was(looked_up: bool) -> None:
    def after(pass_: Pass[Any, Any], program: Program) -> Program:
        return pass_.apply(program, pass_.plan(program, Context(original=program)))

    original = folded(nn.Sequential(nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 4)), noise(16, 96))
    program = after(Svd(SvdOptions(rank=32)), original)
    if looked_up:
        stored = after(Codebook(CodebookOptions(bits=2)), program)
    else:
        stored, _ = quantized(program, noise(16, 96), options=Int8Options(weight_bits=4))
    known, before = twin_of(stored, program, original, learn_steps=True).program.state_dict(), program.state_dict()
    for name in ("0.v.weight", "0.u.weight"):
        (start,) = (one for other, one in known.items() if other.startswith(name) and other.endswith("_real"))
        start = start.reshape(before[name].shape) * known.get(f"{name}_codebook.scale", torch.ones(1))
        ways = (before[name], before[name].mT.reshape(start.shape))  # a product may read it the other way round
        assert max(float(torch.isclose(start, way, atol=1e-3).double().mean()) for way in ways) > 0.95


def test_the_gain_of_a_step_is_by_what_shares_it() -> None:
    """Esser et al. 2020, section 2.2: 1 / sqrt(values * largest integer), of a weight or of one sample's values."""
    program = folded(Tokens(), IDS)
    stored, _ = quantized(program, IDS)
    weights = twin_of(stored, program, program, learn_steps=True).program
    gains = {node.args[-1] for node in weights.graph.nodes if node.target is FAKE_QUANTIZE and node.args[3] is not None}
    assert gains == {step_gain(8, 127), step_gain(16, 127)}  # a row has 8 inputs, or 16
    program = folded(Perceptron(), noise(16, 8))
    stored, _ = quantized(program, noise(16, 8))
    values = twin_of(stored, program, program, learn_steps=True).program
    gains = {node.args[-1] for node in values.graph.nodes if node.target is FAKE_QUANTIZE and node.args[3] is None}
    assert gains == {step_gain(8, 255), step_gain(16, 255)}


@pytest.mark.parametrize(
    "options",
    [{}, {"bits": 3, "group": 5}, {"bits": 2, "group": 4}, {"bits": 4, "vector": 3}, {"codes": "binary"},
     {"codes": "ternary"}],
    ids=str,
)  # fmt: skip
def test_of_weights_that_are_looked_up(options: dict[str, object]) -> None:
    class Coded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.up = nn.Conv2d(8, 32, 3), nn.Conv2d(32, 32, 3, groups=2), nn.ConvTranspose2d(32, 16, 3)
            self.matrix = nn.Parameter(torch.randn(16, 32))

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.b(self.a(x).relu()).relu()).mean((2, 3)) @ self.matrix

    data = noise(4, 8, 8, 8)
    program = folded(Coded(), data)
    pass_ = Codebook(CodebookOptions(**options))  # type: ignore[arg-type]
    stored = pass_.apply(program, pass_.plan(program, Context(original=program)))
    twin = check(program, stored, data)
    assert len(twin.lookups) == len([name for name in stored.state_dict() if name.endswith(".table")]) > 2
    signs = "codes" in options
    trained = {name: one for name, one in shaken(twin).items() if not (signs and name.endswith(".table"))}
    found = twin.stored({name: -one if name in twin.lookups else one for name, one in trained.items()})
    assert all(any(f"{one.stem}.codes" in name for name in found) for one in twin.lookups.values())
    assert any(name.endswith(".table") for name in found) is not signs
    known, gm = twin.program.state_dict(), stored.graph_module
    entries = {one.stem: one.looked_up(gm) for one in find_lookups(gm)}
    for name, lookup in twin.lookups.items():  # most start where they were, not at what they are looked up as
        assert float((known[name] != entries[lookup.stem]).double().mean()) > 0.5


def test_gradients_pass_through_lstms_on_integers_whose_weights_stay() -> None:
    torch.manual_seed(0)
    x = noise(4, 5, 6)
    program = capture(Tagger().eval(), (x,))
    stored, plan = quantized(program, x)
    assert plan.recurrent
    twin = twin_of(stored, program, program, learn_steps=True)
    for found, wanted in zip(results(twin.program, x), results(stored, x), strict=True):
        assert torch.equal(found, wanted)
    gradients = []
    for one in (program, twin.program):
        given = x.clone().requires_grad_()
        torch.stack([part.square().sum() for part in one.call_flat((given,))]).sum().backward()  # type: ignore[no-untyped-call]
        assert given.grad is not None
        gradients.append(given.grad.flatten())
    assert float(torch.cosine_similarity(*gradients, dim=0)) > 0.999
    biases = [name for name, one in twin.program.graph_module.named_parameters() if name.endswith(".bias")]
    assert all(twin.program.graph_module.get_parameter(name).grad is not None for name in biases)
