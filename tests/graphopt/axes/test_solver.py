"""Unification: what two layouts become, and what is frozen where they cannot agree."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from graphopt.axes.layout import ONE, Axis, Layout, Product, concat, describe, leaves, product, size
from graphopt.axes.solver import Solver

Build = Callable[[Callable[[int], Layout]], Layout]


def p(*sizes: int) -> Build:
    return lambda axis: product(axis(n) for n in sizes)


def c(*parts: int | Build) -> Build:
    return lambda axis: concat(axis(n) if isinstance(n, int) else n(axis) for n in parts)


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        (p(6), p(6), "6"),
        (p(768), p(12, 64), "(12 x 64)"),
        (p(12, 64), p(768), "(12 x 64)"),
        (p(6, 4), p(2, 3, 4), "(2 x 3 x 4)"),
        (p(2, 12), p(6, 4), "(2 x 3 x 4)"),
        (p(8), c(3, 5), "[3 | 5]"),
        (c(3, 5), c(5, 3), "[3 | 2 | 3]"),
        (c(2, 2, 4), c(4, 4), "[2 | 2 | 4]"),
        (p(12, 4), c(16, 32), "([4 | 8] x 4)"),
        # The boundary at 6 cuts index 1 of the outer factor: it is isolated, and the inner factor is cut at 2.
        (p(3, 4), c(6, 6), "([1 | 1 | 1] x [2 | 2])"),
        (p(3, 8), c(8, 8, 8), "([1 | 1 | 1] x 8)"),
        (c(4, p(2, 3)), c(4, 2, 4), "[4 | ([1 | 1] x [2 | 1])]"),
    ],
)
def test_unification(left: Build, right: Build, expected: str) -> None:
    solver = Solver()
    a, b = left(solver.axis), right(solver.axis)
    solver.unify(a, b, "here")
    assert describe(solver.resolve(a)) == expected
    assert list(_flat(solver, a)) == list(_flat(solver, b))
    assert all(solver.reason(axis) is None for axis in leaves(solver.resolve(a)))


def _flat(solver: Solver, layout: Layout) -> list[int]:
    """Return, for each position, nothing but the identities of the axes it lies in."""
    resolved = solver.resolve(layout)
    return sorted(axis.id for axis in set(leaves(resolved)))


def test_what_has_no_common_refinement_is_frozen_and_the_rest_is_not() -> None:
    solver = Solver()
    outer, two, three, inner = solver.axis(5), solver.axis(2), solver.axis(3), solver.axis(7)
    three_, two_ = solver.axis(3), solver.axis(2)
    solver.unify(product([outer, two, three, inner]), product([solver.axis(5), three_, two_, solver.axis(7)]), "view")
    for layout in (two, three, two_, three_):
        reason = solver.reason(_axis(solver, layout))
        assert reason == "(2 x 3) and (3 x 2) have no common refinement at view"
    assert solver.reason(_axis(solver, outer)) is None
    assert solver.reason(_axis(solver, inner)) is None


def test_different_sizes_are_frozen() -> None:
    solver = Solver()
    a, b = solver.axis(4), solver.axis(5)
    solver.unify(a, b, "add")
    assert solver.reason(_axis(solver, a)) == "4 and 5 have no common refinement at add"


def test_a_frozen_axis_freezes_what_it_becomes() -> None:
    solver = Solver()
    frozen, other = solver.axis(12, "reaches the output"), solver.axis(12)
    heads, dim = solver.axis(3), solver.axis(4)
    solver.unify(frozen, product([heads, dim]), "view")
    solver.unify(other, product([heads, dim]), "view")
    assert {solver.reason(axis) for axis in leaves(solver.resolve(other))} == {"reaches the output"}


def test_the_first_reason_stays() -> None:
    solver = Solver()
    a = solver.axis(3, "first")
    solver.freeze(a, "second")
    assert solver.reason(_axis(solver, a)) == "first"


def test_size_one_is_no_axis() -> None:
    assert Solver().axis(1) == ONE


def test_a_dynamic_factor_is_split_off_a_dynamic_size() -> None:
    batch = sympy.Symbol("s0", integer=True, positive=True)
    solver = Solver()
    merged = solver.axis(12 * batch)
    heads = solver.axis(12)
    solver.unify(product([solver.axis(batch), heads]), merged, "view")
    resolved = solver.resolve(merged)
    assert isinstance(resolved, Product)
    assert [size(factor) for factor in resolved.factors] == [batch, 12]
    assert solver.reason(_axis(solver, heads)) is None


def test_dynamic_sizes_that_do_not_divide_are_frozen() -> None:
    a, b = (sympy.Symbol(name, integer=True, positive=True) for name in ("s0", "s1"))
    solver = Solver()
    heads = solver.axis(6)
    solver.unify(product([solver.axis(a * b), heads]), product([heads, solver.axis(a * b)]), "view")
    assert "no common refinement" in str(solver.reason(_axis(solver, heads)))


def _axis(solver: Solver, layout: Layout) -> Axis:
    resolved = solver.resolve(layout)
    assert isinstance(resolved, Axis)
    return resolved


@st.composite
def terms(draw: st.DrawFn, length: int, depth: int = 3) -> Build:
    """Return a builder of some layout of exactly this size."""
    if length == 1 or depth == 0 or draw(st.booleans()):
        return lambda axis: axis(length)
    divisors = [n for n in range(2, length) if length % n == 0]
    if divisors and draw(st.booleans()):
        outer = draw(st.sampled_from(divisors))
        first, second = draw(terms(outer, depth - 1)), draw(terms(length // outer, depth - 1))
        return lambda axis: product([first(axis), second(axis)])
    cut = draw(st.integers(1, length - 1))
    first, second = draw(terms(cut, depth - 1)), draw(terms(length - cut, depth - 1))
    return lambda axis: concat([first(axis), second(axis)])


@given(st.data(), st.sampled_from([2, 4, 6, 8, 12, 24, 36]))
def test_unified_layouts_agree_position_by_position_or_are_frozen(data: st.DataObject, length: int) -> None:
    solver = Solver()
    first, second, third = (data.draw(terms(length))(solver.axis) for _ in range(3))
    solver.unify(first, second, "one")
    solver.unify(second, third, "two")
    free = [
        {axis.id for axis in leaves(solver.resolve(layout)) if solver.reason(axis) is None}
        for layout in (first, second, third)
    ]
    for number in free[0] | free[1] | free[2]:
        # Removing any one index of a free axis removes the same positions on all sides.
        for layout in (first, second):
            assert _positions(solver, layout, number) == _positions(solver, third, number)
    assert {size(solver.resolve(layout)) for layout in (first, second, third)} == {length}


def _positions(solver: Solver, layout: Layout, number: int) -> list[list[int]]:
    from graphopt.axes.layout import surviving

    resolved = solver.resolve(layout)
    count = next((int(axis.size) for axis in leaves(resolved) if axis.id == number), 0)
    return [list(surviving(resolved, {number: [i for i in range(count) if i != gone]})) for gone in range(count)]
