"""What is read off a layer's call, whichever operator it is spelled with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphopt.capturing.capture import capture
from graphopt.passes.layers.weighted_call import WeightedCall, layer_call, other_users, weighted_call


class Spelled(nn.Module):
    """One layer written as a call of `operator`."""

    def __init__(self, spelling: str, *weight: int, computed: bool = False) -> None:
        super().__init__()
        self.spelling, self.computed = spelling, computed
        self.weight, self.bias = nn.Parameter(torch.randn(weight)), nn.Parameter(torch.randn(weight[-1]))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + x.mean() if self.computed else self.weight
        if self.spelling == "addmm":
            return torch.addmm(self.bias, x, weight)
        if self.spelling == "scaled addmm":
            return torch.addmm(self.bias, x, weight, alpha=2)
        if self.spelling == "matmul":
            return x @ weight
        transposed = self.spelling == "convolution, transposed"
        return torch.ops.aten.convolution.default(x, weight, None, [2, 2], [1, 1], [1, 1], transposed, [0, 0], 2)


def described(model: nn.Module, *shape: int) -> tuple[WeightedCall | None, WeightedCall | None]:
    """Return the last layer as `layer_call` and as `weighted_call` describe it."""
    program = capture(model, (torch.randn(shape),))
    layers = [call for node in program.graph.nodes if (call := layer_call(node, program.graph_module)) is not None]
    last = layers[-1] if layers else None
    return last, None if last is None else weighted_call(last.node, program.graph_module)


@pytest.mark.parametrize(
    ("model", "shape", "kind", "features", "axes", "kernel", "groups"),
    [
        (nn.Linear(5, 3), (2, 4, 5), "linear", (5, 3), (2, 2, 0), (), 1),
        (Spelled("addmm", 5, 3), (2, 5), "matmul", (5, 3), (1, 1, 1), (), 1),
        (Spelled("matmul", 5, 3), (2, 4, 5), "matmul", (5, 3), (2, 2, 1), (), 1),
        (nn.Conv1d(4, 6, 3, padding="same"), (2, 4, 9), "conv", (4, 6), (1, 1, 0), (3,), 1),
        (nn.ConvTranspose2d(4, 6, (1, 3), groups=2), (2, 4, 9, 9), "transposed conv", (4, 6), (1, 1, 1), (1, 3), 2),
        (Spelled("convolution", 6, 2, 3, 3), (2, 4, 9, 9), "conv", (4, 6), (1, 1, 0), (3, 3), 2),
        (Spelled("convolution, transposed", 4, 3, 3, 3), (2, 4, 9, 9), "transposed conv", (4, 6), (1, 1, 1), (3, 3), 2),
    ],
)
def test_one_description(
    model: nn.Module,
    shape: tuple[int, ...],
    kind: str,
    features: tuple[int, int],
    axes: tuple[int, int, int],
    kernel: tuple[int, ...],
    groups: int,
) -> None:
    layer, call = described(model, *shape)
    assert layer is not None
    assert call is not None
    assert (layer.kind, layer.groups, layer.kernel) == (kind, groups, kernel)
    assert (layer.in_features, layer.out_features) == features
    assert (layer.input_axis, layer.output_axis, layer.weight_axis) == axes


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Spelled("addmm", 5, 3, computed=True), (2, 5)),
        (Spelled("scaled addmm", 5, 3), (2, 5)),
        (Spelled("convolution", 6, 2, 3, 3, computed=True), (2, 4, 9, 9)),
    ],
)
def test_a_layer_whose_weight_is_not_there_to_be_changed(model: nn.Module, shape: tuple[int, ...]) -> None:
    layer, call = described(model, *shape)
    assert layer is not None
    assert call is None


def test_a_product_of_two_values_is_no_layer() -> None:
    assert described(Spelled("matmul", 5, 3, computed=True), 2, 5) == (None, None)


def test_who_else_reads_a_weight() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
            self.other.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.one(x))

    program = capture(Tied(), (torch.randn(2, 4),))
    one, other = (call for node in program.graph.nodes if (call := weighted_call(node, program.graph_module)))
    assert other_users(one, program.graph_module) == [other.node]
    assert other_users(other, program.graph_module) == [one.node]
