"""Guards are computed as sympy does, for many sizes at once."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import sympy  # type: ignore[import-untyped]
from torch.utils._sympy.functions import CeilToInt, FloorDiv, IntTrueDiv, Max, Mod, ModularIndexing, Where

from graphopt.ir import symbolic
from graphopt.ir.symbolic import computed, holds

SIZE, OTHER = (sympy.Symbol(name, integer=True, positive=True) for name in ("size", "other"))
SIZES = np.arange(1, 40)


@pytest.mark.parametrize(
    "guard",
    [
        sympy.Ne(Mod(4 * SIZE, 6 * FloorDiv(SIZE + 2, 2)), 0),
        sympy.Eq(FloorDiv(SIZE + 15, 16), 1) & (SIZE**2 < 90),
        sympy.Eq(Where(SIZE < 7, SIZE, 3), 3),
        ~(Max(SIZE, 5) >= 7) | sympy.Eq(ModularIndexing(SIZE, 2, 3), 1),
        CeilToInt(IntTrueDiv(SIZE, 4)) <= 3,
    ],
)
def test_guards_hold_as_sympy_says(guard: Any) -> None:
    assert holds(guard, {SIZE: SIZES}).tolist() == [guard.subs(SIZE, int(size)) for size in SIZES]
    with mock.patch.object(sympy.Basic, "subs", side_effect=AssertionError):  # it takes milliseconds for each size
        holds(guard, {SIZE: SIZES})


def test_what_divides_by_zero_asks_nothing() -> None:
    guard = sympy.Eq(Mod(SIZE, FloorDiv(SIZE, 4)), 0)
    assert holds(guard, {SIZE: np.array([2, 3, 4, 9])}).tolist() == [True, True, True, False]


def test_functions_that_arrays_lack_are_asked_one_by_one() -> None:
    with mock.patch.object(symbolic, "_Arrays", return_value=mock.Mock(spec=["constant"])):
        held = holds(SIZE + OTHER < 20, {SIZE: SIZES, OTHER: np.array(3)})
    assert held.tolist() == [size < 17 for size in SIZES]
    assert holds(sympy.sin(SIZE) < 0.5, {SIZE: SIZES}).tolist() == [np.sin(size) < 0.5 for size in SIZES]


def test_powers_are_larger_than_integers_may_be() -> None:
    assert holds(SIZE**12 < 10**19, {SIZE: SIZES}).tolist() == [size**12 < 10**19 for size in SIZES.tolist()]
    assert holds(2**SIZE < 2**70, {SIZE: np.array([69, 70, 71])}).tolist() == [True, False, False]


def test_sizes_of_axes() -> None:
    assert computed(2 * SIZE + OTHER, {SIZE: SIZES, OTHER: 3}).tolist() == [2 * size + 3 for size in range(1, 40)]
