"""Propagation: equal calls of plain operators run once, all others every time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from graphopt import Program, capture
from graphopt.ir.graph import fake_mode_of
from graphopt.ir.propagation import Propagation

aten = torch.ops.aten


class Calls(nn.Module):
    """Calls that are alike, and calls that nearly are."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        first, same, other = x.relu(), (x + 1).relu(), x.double().relu()
        views = x.flatten(1), (x + 1).flatten(1)
        truths = torch.clamp(x, max=1), torch.clamp(x, max=1.0)
        counted = (x > 0).nonzero(), (x > 0).nonzero()
        return (first, same, other, *views, *truths, *counted)


@pytest.fixture(scope="module")
def program() -> Program:
    """Those calls."""
    return capture(Calls(), torch.randn(2, 3, 4))


def results(program: Program, target: Any) -> list[Any]:
    propagation = Propagation(fake_mode_of(program.graph_module))
    found = []
    for node in program.graph.find_nodes(op="call_function", target=target):
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda used: used.meta["val"])
        found.append(propagation.call(node, args, kwargs))
    return found


def test_equal_calls_give_one_value(program: Program) -> None:
    one, same, other = results(program, aten.relu.default)
    assert one is same
    assert other.dtype is torch.float64
    assert [tuple(map(str, value.shape))[1:] for value in (one, other)] == [("3", "4")] * 2


def test_equal_numbers_of_another_type_are_another_call(program: Program) -> None:
    one, other = results(program, aten.clamp.default)
    assert one is not other


@pytest.mark.parametrize("target", [aten.flatten.using_ints, aten.nonzero.default])
def test_views_and_what_depends_on_data_run_every_time(program: Program, target: Any) -> None:
    one, other = results(program, target)
    assert one is not other
