"""Unique names: the wanted one if it is free, otherwise the first free one that is numbered on.

weight, weight_1, weight_2, ...             what is stored: attributes, values of a file
conv1:channels, conv1:channels#2, ...       what people read (`mark="#"`): the second of a description is number 2
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

Mark = Literal["_", "#"]


def unused(wanted: str, is_taken: Callable[[str], bool]) -> str:
    """Return `wanted`, or `wanted_1`, `wanted_2`, ...: the first name that is not taken."""
    return _first(wanted, is_taken, "_", itertools.count(1))


class Names:
    """Hands out names, none of them twice.

    Args:
        taken: the names that others have.
        mark: what stands before a number.
    """

    def __init__(self, taken: Iterable[str] = (), *, mark: Mark = "_") -> None:
        self._taken = set(taken)
        self._mark = mark
        self._numbers: dict[str, Iterator[int]] = {}  # of a wanted name, those not tried yet: thousands may want one

    def new(self, wanted: str) -> str:
        """Return `wanted`, or the first free name made of it; it is taken from now on."""
        numbers = self._numbers.setdefault(wanted, itertools.count(1 if self._mark == "_" else 2))
        name = _first(wanted, self._taken.__contains__, self._mark, numbers)
        self._taken.add(name)
        return name


def _first(wanted: str, is_taken: Callable[[str], bool], mark: Mark, numbers: Iterator[int]) -> str:
    name = wanted
    while is_taken(name):
        name = f"{wanted}{mark}{next(numbers)}"
    return name
