"""Propagation: equal calls of plain operators run once in a mode, all others every time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from graphopt import Program, capture
from graphopt.ir import propagation
from graphopt.ir.graph import fake_mode_of
from graphopt.ir.invariants import check_invariants
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


def results(program: Program, target: Any, purpose: str = "a test") -> list[Any]:
    propagated = Propagation(fake_mode_of(program.graph_module), purpose)
    found = []
    for node in program.graph.find_nodes(op="call_function", target=target):
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda used: used.meta["val"])
        found.append(propagated.call(node, args, kwargs))
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


def test_what_is_known_is_shared_by_those_who_run_calls_for_the_same(program: Program) -> None:
    one, other, checked = (results(program.copy(), aten.relu.default, what)[0] for what in ("a", "a", "check"))
    assert one is other
    assert one is not checked


def test_autocast_and_the_default_type_make_another_call(program: Program) -> None:
    plain = results(program, aten.add.Tensor)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert results(program, aten.add.Tensor)[0] is not plain
    torch.set_default_dtype(torch.float64)
    try:
        assert results(program, aten.add.Tensor)[0] is not plain
    finally:
        torch.set_default_dtype(torch.float32)
    assert results(program, aten.add.Tensor)[0] is plain


def test_no_more_is_known_than_so_much(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(propagation, "_MOST_KNOWN", 1)
    assert len({id(value) for value in results(program, aten.clamp.default, "bounded")}) == 2
    mode = fake_mode_of(program.graph_module)
    assert [len(known) for name, known in vars(mode).items() if name.endswith("bounded")] == [1]


def test_a_result_that_is_turned_in_place_is_no_other_calls() -> None:
    class Turned(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            turned = x.relu()
            turned.t_()
            return turned, x.relu()

    turning = capture(Turned(), torch.randn(2, 3))
    for _ in range(2):
        check_invariants(turning, turning.copy(), "a test")
    assert [one.shape[1] for one in results(turning, aten.relu.default)] == [3, 3]
