"""Blocks apart: each reads what it is given, and learns from its own error alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphopt.capturing.capture import capture
from graphopt.distillation.blocks import boundaries, separated
from graphopt.distillation.cuts import auto_taps
from graphopt.distillation.objective import Objective, targets_of
from graphopt.distillation.pairing import Pair
from graphopt.distillation.taps import insert_taps
from graphopt.ir.program import Program
from tests.graphopt.distillation.models import ResidualNet


@pytest.fixture
def tapped() -> Program:
    torch.manual_seed(0)
    program = capture(ResidualNet().eval(), torch.randn(2, 3, 8, 8))
    return insert_taps(program, auto_taps(program, 4)).copy(share_tensors=False)


def test_given_its_own_values_it_computes_the_same(tapped: Program) -> None:
    x = torch.randn(5, 3, 8, 8)
    apart = separated(tapped, [0, 1])
    wanted = tapped.call_flat([x])
    torch.testing.assert_close(apart.call_flat([x, *wanted[1:]]), wanted, rtol=0, atol=0)
    assert [spec.name for spec in apart.inputs] == ["x", "given_0", "given_1"]
    assert {id(p) for p in apart.parameters()} == {id(p) for p in tapped.parameters()}


@pytest.mark.parametrize(
    ("output", "blocks"), [(1, {"stem", "stem_bn", "layer1"}), (2, {"down", "layer2"}), (0, {"head"})]
)
def test_no_gradient_crosses_a_boundary(tapped: Program, output: int, blocks: set[str]) -> None:
    x = torch.randn(5, 3, 8, 8)
    apart = separated(tapped, [0, 1])
    given = [value.detach() for value in tapped.call_flat([x])[1:]]
    apart.call_flat([x, *given])[output].sum().backward()
    moved = {name.partition(".")[0] for name, p in apart.graph_module.named_parameters() if p.grad is not None}
    assert moved == blocks


def test_values_of_another_shape_are_no_boundary(tapped: Program) -> None:
    class Wider(ResidualNet):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv2d(8, 12, 2, stride=2)
            self.layer2, self.head = nn.Conv2d(12, 12, 3, padding=1), nn.Linear(12, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layer1(self.stem_bn(self.stem(x)).relu())
            x = self.down(x)
            return self.head((x + self.layer2(x)).mean((2, 3)))

    teacher = capture(Wider().eval(), torch.randn(2, 3, 8, 8))
    teacher = insert_taps(teacher, auto_taps(teacher, 4))
    pairs = [Pair(tap, tap) for tap in auto_taps(tapped, 4)]
    objective = Objective(targets_of(teacher)[0], pairs, 4.0, 1.0)
    assert boundaries(tapped, teacher, objective) == [0]
