"""Work: what calls do for one sample, and which kernels have costs of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphopt.capturing.capture import capture
from graphopt.ir.operators import short_name
from graphopt.ir.program import Program
from graphopt.measure.work import Workload, special_kernel, special_move
from graphopt.targets.costs import Work


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped, self.point, self.last = nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 4, 1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.deep(self.first(x))
        y = self.point(self.grouped(y + y.mean((2, 3), keepdim=True)) + 0)
        return self.last(y.mean((2, 3)))


@pytest.fixture(scope="module")
def program() -> Program:
    return capture(Layers(), (torch.randn(2, 3, 6, 6),))


@pytest.fixture(scope="module")
def fixed() -> Program:
    return capture(nn.Linear(4, 5), (torch.randn(3, 4),), dynamic_shapes={"input": {0: None}})


def test_work_is_that_of_one_sample(program: Program, fixed: Program) -> None:
    calls = {node.name: node for node in program.graph.nodes}
    work = Workload(program)
    assert work.of(calls["conv2d"]) == Work(2 * 36 * 8 * 27, 3 * 36 + 8 * 27 + 8 + 8 * 36)
    assert work.of(calls["linear"]) == Work(2 * 20, 4 + 20 + 5 + 5)
    assert work.elements(calls["conv2d_1"]) == 8 * 36
    linear = next(node for node in fixed.graph.nodes if short_name(node) == "linear")
    assert Workload(fixed).of(linear) == Work(3 * 2 * 20, 3 * 4 + 20 + 5 + 3 * 5)


@pytest.mark.parametrize(("channels", "groups", "kernel"), [(64, 4, "conv2d_grouped"), (60, 4, "conv2d_narrow")])
def test_groups_that_fill_no_vector_are_told_from_others(channels: int, groups: int, kernel: str) -> None:
    program = capture(nn.Conv2d(channels, 32, 3, groups=groups), torch.randn(2, channels, 4, 4))
    node = next(node for node in program.graph.nodes if short_name(node) == "conv2d")
    assert special_kernel("conv2d", node) == kernel


def test_kernels_are_told_apart(program: Program) -> None:
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    found = [special_kernel(short_name(node), node) for node in calls if short_name(node) in ("conv2d", "add")]
    kinds = ["conv2d_first", "conv2d_depthwise", "add_broadcast", "conv2d_narrow", "add", "conv2d_pointwise"]
    assert found == kinds
    layer, pooled = (next(node for node in calls if short_name(node) == name) for name in ("conv2d", "linear"))
    assert [special_move("quantize", value) for value in (layer, pooled)] == ["quantize_map", "quantize"]
