"""What is free is given back: dead circles where weights are large, pages where the C library keeps them."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

from graphopt.ir.memory import give_back, trim


class Circle:
    """Refers to itself, as a graph and its module do."""

    def __init__(self) -> None:
        self.own = self


@pytest.fixture(autouse=True)
def without_collections() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(("numbers", "left"), [(1 << 26, False), (1 << 24, True)])
def test_dead_circles_go_where_tensors_are_large(numbers: int, left: bool) -> None:
    circle = Circle()
    known = weakref.ref(circle)
    del circle
    give_back([torch.empty(numbers, device="meta")])
    assert (known() is not None) == left


def test_pages_are_returned_where_the_library_can(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        returned = 0

        def malloc_trim(self, _: int) -> None:
            self.returned += 1

    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    trim(1 << 24)
    trim(1 << 10)
    assert library.returned == 1
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    trim(1 << 24)
