"""What is free is given back: dead circles where weights are large, pages where the C library keeps them."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import weakref
from collections.abc import Iterator

import pytest
import torch

from graphopt.ir import memory
from graphopt.ir.memory import give_back, trim, what_is_there_set_aside


class Circle:
    """Refers to itself, as a graph and its module do."""

    def __init__(self) -> None:
        self.own = self


@pytest.fixture(autouse=True)
def without_collections(monkeypatch: pytest.MonkeyPatch, growth_as_shipped: float) -> Iterator[None]:
    monkeypatch.setattr(memory, "_blocks", sys.getallocatedblocks())
    monkeypatch.setattr(memory, "_GROWTH", growth_as_shipped)
    before = gc.get_threshold()
    gc.set_threshold(0)
    yield
    gc.set_threshold(*before)


def dead_circle() -> weakref.ref[Circle]:
    return weakref.ref(Circle())


@pytest.mark.parametrize(("numbers", "left"), [(1 << 26, False), (1 << 24, True)])
def test_dead_circles_go_where_tensors_are_large(numbers: int, left: bool) -> None:
    known = dead_circle()
    give_back([torch.empty(numbers, device="meta")])
    assert (known() is not None) == left


def test_only_what_is_made_meanwhile_is_looked_at() -> None:
    before = dead_circle()
    with contextlib.suppress(KeyError), what_is_there_set_aside():
        with what_is_there_set_aside():
            within = dead_circle()
        gc.collect()
        assert (before() is not None, within()) == (True, None)
        raise KeyError
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert before() is None


def test_all_is_looked_at_where_tensors_are_large() -> None:
    before = dead_circle()
    with what_is_there_set_aside():
        give_back([torch.empty(1 << 26, device="meta")])
        assert (before(), gc.get_freeze_count()) == (None, 0)


def test_all_is_looked_at_first_where_much_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    known = []
    monkeypatch.setattr(memory, "_blocks", 0)
    for used in (1000, 1200, 1251, 1500):
        monkeypatch.setattr(sys, "getallocatedblocks", lambda used=used: used)
        known.append(dead_circle())
        with what_is_there_set_aside():
            assert [one() is None for one in known] == [used in (1000, 1251)] * len(known)
        known = [one for one in known if one() is not None]


def test_what_others_set_aside_stays_there() -> None:
    gc.freeze()
    try:
        before = gc.get_freeze_count()
        with what_is_there_set_aside():
            kept = [Circle() for _ in range(1000)]
        assert before - 500 < gc.get_freeze_count() <= before, len(kept)
    finally:
        gc.unfreeze()


def test_what_others_set_aside_meanwhile_stays_there() -> None:
    try:
        with what_is_there_set_aside():
            gc.freeze()
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()


def test_nothing_is_set_aside_where_python_does_not_look() -> None:
    gc.disable()
    try:
        with what_is_there_set_aside():
            assert gc.get_freeze_count() == 0
    finally:
        gc.enable()


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
