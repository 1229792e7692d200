"""Outputs of programs one site of which computes otherwise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from graphopt.capturing.capture import capture
from graphopt.errors import DataError
from graphopt.ir.program import Program
from graphopt.pipeline.knobs import Knob, on_changed
from graphopt.statistics.sensitivity import Altered, noise_shares, sensitivities

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class Steps(nn.Module):
    """Two layers in a row beside a third, one of them in place, with outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        y = self.two(torch.relu(self.one(x)))
        return {"sum": (y + self.three(x)) * scale, "place": y.argmax(1)}


class InPlace(Steps):
    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        y = self.one(x).relu_()
        z = y.clone()
        y.add_(self.two(y))
        return {"sum": y * scale, "rest": z}


def linear_knobs(program: Program, factor: float) -> list[Knob]:
    """Knobs that scale the weight of one linear layer each."""
    layers = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    return [Knob(n.name, (n.name,), {n: on_changed(n, {n.args[1]: lambda w: w * factor})}) for n in layers]  # type: ignore[dict-item]


@pytest.mark.parametrize("kind", [Steps, InPlace])
def test_noise_is_that_of_the_program_with_another_layer(kind: type[Steps]) -> None:
    model = kind().eval()
    program = capture(model, (X,), {"scale": torch.ones(4)})
    batches = [(X[:4], torch.ones(4)), (X[4:], torch.ones(4))]
    knobs = linear_knobs(program, 1.25)
    found = sensitivities(program, batches, knobs)
    layers = [model.one, model.two, model.three][: len(knobs)]
    for noise, layer, knob in zip(found, layers, knobs, strict=True):
        with torch.no_grad():
            wanted = [list(model(x, scale=scale).values()) for x, scale in batches]
            layer.weight.mul_(1.25)
            changed = [list(model(x, scale=scale).values()) for x, scale in batches]
            layer.weight.div_(1.25)
        shares = [share for pair in zip(wanted, changed, strict=True) for share in noise_shares(*pair)]
        assert noise == pytest.approx(sum(shares) / len(shares), rel=1e-4)
        assert noise > 1e-4
        altered = Altered(program, [knob])(X[:4], scale=torch.ones(4))
        assert list(altered) == list(model(X, scale=torch.ones(4)))  # the structure of the model's own
        assert torch.allclose(altered["sum"], changed[0][0], atol=1e-6)


def test_without_a_knob_it_is_the_program() -> None:
    model = Steps().eval()
    program = capture(model, (X,), {"scale": torch.ones(4)})
    assert torch.equal(Altered(program, [])(X, scale=torch.ones(4))["sum"], program(X, scale=torch.ones(4))["sum"])
    assert sensitivities(program, [(X, torch.ones(4))], linear_knobs(program, 1.0)) == [0.0, 0.0, 0.0]


def test_the_worst_output_counts_and_places_are_right_or_wrong() -> None:
    wanted = [torch.tensor([[1.0, 1.0], [2.0, 0.0]]), torch.tensor([3, 4])]
    found = [torch.tensor([[1.0, 1.0], [2.0, 1.0]]), torch.tensor([3, 5])]
    assert noise_shares(wanted, found) == [0.0, 1.0]
    assert noise_shares(wanted[:1], found[:1]) == [0.0, 0.25]
    assert noise_shares([torch.zeros(1, 2)], [torch.ones(1, 2)]) == [math.inf]


def test_a_knob_that_gives_no_numbers_is_without_bound() -> None:
    ones = torch.ones(1, 2)
    assert noise_shares([ones, ones], [ones, ones * math.nan]) == [math.inf]
    program = capture(Steps().eval(), (X,), {"scale": torch.ones(4)})
    knobs = [*linear_knobs(program, math.nan), *linear_knobs(program, 1.5)]
    found = sensitivities(program, [(X, torch.ones(4))], knobs)
    assert found[:3] == [math.inf] * 3
    assert all(math.isfinite(noise) for noise in found[3:])


def test_data_that_tell_nothing_are_refused() -> None:
    program = capture(Steps().eval(), (X,), {"scale": torch.ones(4)})
    with pytest.raises(DataError, match="NaN or infinite"):
        sensitivities(program, [(X * math.nan, torch.ones(4))], linear_knobs(program, 2.0))
