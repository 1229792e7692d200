"""Models that no one would draw but some export: mixed dtypes, outputs that are inputs, equal or constant."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

import graphopt

X = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
PASSES = ("", "prune:ratio=0.5:round_to=1", "svd:ratio=0.5", "int8")


class Mixed(nn.Module):
    """A float16 layer between float32 ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(16, 32), nn.Linear(32, 32).half(), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x).relu().half()).relu().float())


class Input(nn.Module):
    """Returns its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class InputTwice(nn.Module):
    """Returns its input twice."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Odd(nn.Module):
    """Returns its input, one result twice, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 4)
        self.register_buffer("constant", torch.tensor([1.0, 2.0]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y = self.last(self.first(x).relu())
        return x, y, y, self.constant


@functools.cache
def captured(kind: type[nn.Module]) -> tuple[nn.Module, graphopt.Program]:
    torch.manual_seed(0)
    model = kind().eval()
    return model, graphopt.capture(model, X[:4])


@pytest.mark.parametrize("target", [None, "onnxruntime", "tensorrt"])
@pytest.mark.parametrize("model", [Input, InputTwice])
def test_int8_finds_nothing_in_a_model_that_returns_its_input(model: type[nn.Module], target: str | None) -> None:
    result = graphopt.optimize(captured(model)[1], X, "int8", target, bench=False)
    assert not any(plan.sites for plan in result.plans)
    for found in outputs(result.program, X):
        assert torch.equal(found, X)


@pytest.mark.parametrize("passes", PASSES)
def test_a_layer_in_half_precision_between_others(passes: str) -> None:
    model, program = captured(Mixed)
    result = graphopt.optimize(program, X, passes, bench=False)
    (found,) = outputs(result.program, X)
    assert found.dtype is torch.float32
    if not passes:
        torch.testing.assert_close(found, model(X))


@pytest.mark.parametrize("passes", PASSES)
def test_outputs_that_are_inputs_equal_or_constant(passes: str) -> None:
    model, program = captured(Odd)
    result = graphopt.optimize(program, X, passes, bench=False)
    same, one, other, constant = outputs(result.program, X)
    assert torch.equal(same, X)
    assert torch.equal(one, other)
    assert torch.equal(constant, model.constant)
    if not passes:
        torch.testing.assert_close(one, model(X)[1])


def outputs(program: graphopt.Program, x: Tensor) -> tuple[Tensor, ...]:
    found = program(x)
    return found if isinstance(found, tuple) else (found,)


class Scaled(nn.Module):
    """Takes a number without axes for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, scale: Tensor, x: Tensor) -> Tensor:
        return self.last((self.first(x) * scale).relu())


@pytest.fixture(scope="module")
def scaled() -> graphopt.Program:
    torch.manual_seed(0)
    return graphopt.capture(Scaled().eval(), (torch.tensor(2.0), X[:4]))


@pytest.mark.parametrize("passes", ["int8", "prune:ratio=0.5:round_to=1,recover:epochs=1"])
def test_an_input_without_axes(scaled: graphopt.Program, passes: str) -> None:
    data = {"scale": torch.tensor(2.0), "x": X}
    result = graphopt.optimize(scaled, data, passes, "onnxruntime", bench=False)
    assert result.program(torch.tensor(2.0), X).shape == (32, 4)


class ScaledMaps(nn.Module):
    """Takes a number without axes between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.last((self.first(x) * scale).relu())


def test_an_input_without_axes_between_convolutions() -> None:
    """ONNX Runtime is handed it without axes: with one, its layout optimizer's Transpose fails."""
    torch.manual_seed(0)
    x = torch.randn(32, 3, 8, 8)
    program = graphopt.capture(ScaledMaps().eval(), (x[:4], torch.tensor(2.0)))
    result = graphopt.optimize(program, (x, torch.tensor(2.0)), "int8", "onnxruntime", bench=False)
    (found,) = result.artifact.session()(x.numpy(), torch.tensor(2.0).numpy())
    assert found.shape == (32, 4, 8, 8)
