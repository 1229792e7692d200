"""The split of a run's samples: parts that do not depend on how they are read, and fewer where there are few."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from graphopt.capturing.capture import capture
from graphopt.data import Samples
from graphopt.data.batches import Batch, SampleSource
from graphopt.data.split import FEWEST, halves, place, split
from graphopt.ir.program import Program
from graphopt.testing import TensorSamples


@pytest.fixture(scope="module")
def any_batch() -> Program:
    return capture(nn.Linear(1, 1), torch.zeros(2, 1))


def fixed(size: int) -> Program:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(size, 1) * 2

    program = capture(Fixed(), torch.zeros(size, 1))
    assert program.batch_size == size
    return program


def numbered(count: int) -> TensorSamples:
    numbers = torch.arange(float(count))
    return TensorSamples((numbers.view(-1, 1),), numbers)


def read(source: SampleSource | None, batch_size: int = 7, limit: int | None = None) -> list[int]:
    assert source is not None
    return [int(value) for (x,) in source.batches(batch_size, limit) for value in x]


@pytest.mark.parametrize(
    ("count", "held", "unseen"),
    [(16, 4, 0), (31, 7, 0), (32, 4, 4), (64, 8, 8), (144, 18, 18), (400, 20, 20), (1024, 51, 51), (20000, 512, 512)],
)
def test_the_share_of_each_part(any_batch: Program, count: int, held: int, unseen: int) -> None:
    parts = split(numbered(count), any_batch)
    assert abs(len(read(parts.held_out, 512)) - held) <= 1
    assert abs(len((parts.unseen and read(parts.unseen, 512)) or []) - unseen) <= 1
    assert sorted(number for part in parts if part for number in read(part, 512)) == list(range(count))


@settings(max_examples=20, deadline=None)
@example(FEWEST, 3, 7)  # two parts
@example(400, 50, 400)
@given(st.integers(FEWEST, 400), st.integers(1, 50), st.integers(1, 400))
def test_it_does_not_depend_on_how_it_is_read(any_batch: Program, count: int, batch_size: int, limit: int) -> None:
    for part, again in zip(split(numbered(count), any_batch), split(numbered(count), any_batch), strict=True):
        if part is None:
            assert count < 2 * FEWEST
            continue
        everything = read(part, 32)
        assert read(again, batch_size) == everything
        assert read(part, batch_size, limit) == everything[:limit]
        assert [place(part, index) for index in range(len(everything))] == everything
        assert {len(x) for (x,) in list(part.batches(batch_size))[:-1]} <= {batch_size}
        for (x,), labels in part.labelled_batches(batch_size):
            assert labels is not None
            assert torch.equal(x.flatten(), labels)


def test_data_in_a_regular_order_is_no_trap(any_batch: Program) -> None:
    parts = split(numbered(9600), any_batch)
    for numbers in map(torch.tensor, (read(parts.held_out), read(parts.unseen))):
        for period in (2, 3, 4, 5, 7, 8, 10, 16, 20, 40):
            kinds = (numbers % period).bincount(minlength=period)
            assert int(kinds.min()) > 0.4 * len(numbers) / period, period


@pytest.mark.parametrize(
    ("count", "size", "held", "unseen"),
    [(64, 8, 8, 8), (24, 8, 8, 0), (32, 16, 16, 0), (645, 64, 64, 64), (16_000, 2000, 2000, 2000)],
)
def test_batches_of_a_fixed_size_stay_together(count: int, size: int, held: int, unseen: int) -> None:
    parts = split(numbered(count), fixed(size))
    assert [len(read(part)) if part else 0 for part in parts[1:]] == [held, unseen]
    for part in filter(None, parts[1:]):
        assert all(int(x[0]) % size == 0 and len(x) == size for (x,) in part.batches(size))
    whole = [x for (x,) in parts.fitted.batches(size) if len(x) == size]
    assert len(whole) == count // size - (held + unseen) // size
    assert all(int(x[0]) % size == 0 for x in whole)


def test_too_few_are_not_split(any_batch: Program) -> None:
    for source, program in ((numbered(FEWEST - 1), any_batch), (numbered(60), fixed(32)), (numbered(16), fixed(16))):
        parts = split(source, program)
        assert parts.fitted is source
        assert parts[1:] == (None, None)


def test_of_a_long_stream_only_the_start_is_counted_and_judges(any_batch: Program) -> None:
    drawn = []

    def stream() -> Iterator[Batch]:
        for number in range(100_000):
            drawn.append(number)
            yield (torch.full((8, 1), float(number)),)

    class Stream:
        def __iter__(self) -> Iterator[Batch]:
            return stream()

    parts = split(Samples.open(Stream(), ["x"]), any_batch)
    assert len(drawn) < 100
    assert [len(read(part, 64)) for part in parts[1:]] == [512, 512]


@pytest.mark.parametrize(("count", "held"), [(16, 1024), (64, 512)])
def test_a_sample_behind_the_last_that_judges_has_no_place(any_batch: Program, count: int, held: int) -> None:
    held_out = split(numbered(count), any_batch).held_out
    assert held_out is not None
    assert place(held_out, held - 1) < 1024 * 10
    with pytest.raises(IndexError, match=f"holds at most {held}; none is number {held}"):
        place(held_out, held)


@pytest.mark.parametrize(("count", "unit"), [(2, 1), (31, 1), (1000, 1), (64, 4), (8, 4)])
def test_halves_share_nothing_and_leave_nothing_out(count: int, unit: int) -> None:
    one, other = (read(half, batch_size=unit) for half in halves(numbered(count), unit))
    assert sorted(one + other) == list(range(count))
    assert abs(len(one) - len(other)) <= max(2 * unit, count // 20)
    assert {number // unit for number in one}.isdisjoint(number // unit for number in other)
    assert one
    assert other
