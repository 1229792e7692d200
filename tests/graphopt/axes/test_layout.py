"""Layout terms: normal form, sizes, and which positions survive a removal."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
import sympy
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from graphopt.axes.groups import coordinates
from graphopt.axes.layout import (
    ONE,
    Axis,
    Concat,
    Layout,
    Product,
    concat,
    describe,
    leaves,
    product,
    size,
    surviving,
    surviving_size,
    touches,
)

A, B, C = Axis(1, 2), Axis(2, 3), Axis(3, 4)
BATCH = Axis(9, sympy.Symbol("s0", integer=True, positive=True))


@pytest.mark.parametrize(
    ("built", "expected"),
    [
        (product([A]), A),
        (product([]), ONE),
        (product([ONE, A, ONE]), A),
        (product([product([A, B]), C]), Product((A, B, C))),
        (concat([A]), A),
        (concat([concat([A, B]), C]), Concat((A, B, C))),
        (product([concat([A, B]), C]), Product((Concat((A, B)), C))),
        (concat([ONE, A]), Concat((ONE, A))),
    ],
)
def test_terms_are_in_normal_form(built: Layout, expected: Layout) -> None:
    assert built == expected


def test_a_concat_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one segment"):
        concat([])


@pytest.mark.parametrize(
    ("layout", "length", "text"),
    [
        (ONE, 1, "1"),
        (A, 2, "2"),
        (product([A, B]), 6, "(2 x 3)"),
        (concat([A, product([B, C])]), 14, "[2 | (3 x 4)]"),
        (product([BATCH, A]), 2 * BATCH.size, "(s0 x 2)"),
    ],
)
def test_size_and_text(layout: Layout, length: object, text: str) -> None:
    assert size(layout) == length
    assert describe(layout) == text


@pytest.mark.parametrize(
    ("layout", "kept", "expected"),
    [
        (A, {}, [0, 1]),
        (A, {1: [1]}, [1]),
        (A, {2: [0]}, [0, 1]),
        (product([A, B]), {1: [1]}, [3, 4, 5]),
        (product([A, B]), {2: [0, 2]}, [0, 2, 3, 5]),
        (product([A, B]), {1: [0], 2: [1]}, [1]),
        (concat([A, B]), {2: [1]}, [0, 1, 3]),
        (concat([A, A]), {1: [1]}, [1, 3]),
        (product([C, concat([A, B])]), {1: [0]}, [0, 2, 3, 4, 5, 7, 8, 9, 10, 12, 13, 14, 15, 17, 18, 19]),
        (concat([ONE, A]), {1: [0]}, [0, 1]),
    ],
)
def test_surviving(layout: Layout, kept: Mapping[int, list[int]], expected: list[int]) -> None:
    assert list(surviving(layout, kept)) == expected
    assert surviving_size(layout, kept) == len(expected)
    assert touches(layout, kept) == (len(expected) < size(layout))


def test_a_dynamic_dimension_has_a_size_but_no_list_of_positions() -> None:
    layout = product([BATCH, A])
    assert surviving_size(layout, {1: [0]}) == BATCH.size
    with pytest.raises(ValueError, match="symbolic"):
        surviving(layout, {1: [0]})


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (product([A, B]), [[0, 0, 0, 1, 1, 1]]),
        (product([B, A]), [[0, 1, 0, 1, 0, 1]]),
        (concat([A, B]), [[0, 1, -1, -1, -1]]),
        (concat([A, A]), [[0, 1, -1, -1], [-1, -1, 0, 1]]),
        (product([A, A]), [[0, 0, 1, 1], [0, 1, 0, 1]]),
        (B, []),
    ],
)
def test_coordinates(layout: Layout, expected: list[list[int]]) -> None:
    assert coordinates(layout, 1) == expected


@st.composite
def layouts(draw: st.DrawFn, depth: int = 3) -> Layout:
    if depth == 0 or draw(st.booleans()):
        number = draw(st.integers(1, 4))
        return Axis(number, number + 1)
    parts = draw(st.lists(layouts(depth=depth - 1), min_size=1, max_size=3))
    return product(parts) if draw(st.booleans()) else concat(parts)


@settings(deadline=None)  # the machine may be busy
@given(layouts(), st.dictionaries(st.integers(1, 4), st.just(None)), st.randoms())
def test_surviving_means_every_coordinate_is_kept(layout: Layout, chosen: dict[int, None], random: object) -> None:
    assume(size(layout) <= 2000)  # every position is looked at
    kept = {number: sorted(random.sample(range(number + 1), 1)) for number in chosen}  # type: ignore[attr-defined]
    alive = torch.ones(int(size(layout)), dtype=torch.bool)
    for axis in dict.fromkeys(leaves(layout)):
        for places in coordinates(layout, axis.id):
            for position, index in enumerate(places):
                if index >= 0 and axis.id in kept and index not in kept[axis.id]:
                    alive[position] = False
    assert list(surviving(layout, kept)) == list(itertools.compress(range(len(alive)), alive.tolist()))
