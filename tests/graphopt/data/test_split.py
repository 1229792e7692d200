"""The split of a run's samples: two parts that do not depend on how they are read, and nothing where there are few."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graphopt.capturing.capture import capture
from graphopt.data import Samples
from graphopt.data.batches import Batch, SampleSource
from graphopt.data.split import FEWEST, place, split
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
    ("count", "held"), [(16, 4), (32, 8), (64, 16), (128, 32), (144, 36), (400, 40), (1024, 102), (20000, 1024)]
)
def test_the_share_that_judges(any_batch: Program, count: int, held: int) -> None:
    fitted, held_out = split(numbered(count), any_batch)
    assert abs(len(read(held_out, 512)) - held) <= 1
    assert sorted(read(fitted, 512) + read(held_out, 512)) == list(range(count))


@settings(max_examples=40, deadline=None)
@given(st.integers(FEWEST, 400), st.integers(1, 50), st.integers(1, 400))
def test_it_does_not_depend_on_how_it_is_read(any_batch: Program, count: int, batch_size: int, limit: int) -> None:
    for part, again in zip(split(numbered(count), any_batch), split(numbered(count), any_batch), strict=True):
        everything = read(part, 32)
        assert read(again, batch_size) == everything
        assert read(part, batch_size, limit) == everything[:limit]
        assert part is not None
        assert [place(part, index) for index in range(len(everything))] == everything
        assert {len(x) for (x,) in list(part.batches(batch_size))[:-1]} <= {batch_size}
        for (x,), labels in part.labelled_batches(batch_size):
            assert labels is not None
            assert torch.equal(x.flatten(), labels)


@pytest.mark.parametrize("period", [2, 3, 4, 5, 7, 8, 10, 16])
def test_data_in_a_regular_order_is_no_trap(any_batch: Program, period: int) -> None:
    _, held_out = split(numbered(3200), any_batch)
    kinds = torch.tensor(read(held_out)) % period
    assert int(kinds.bincount(minlength=period).min()) > 0.5 * len(kinds) / period


@pytest.mark.parametrize(("count", "size", "held"), [(64, 8, 16), (24, 8, 8), (32, 16, 16), (645, 64, 64)])
def test_batches_of_a_fixed_size_stay_together(count: int, size: int, held: int) -> None:
    fitted, held_out = split(numbered(count), fixed(size))
    assert held_out is not None
    assert len(read(held_out)) == held
    assert all(int(x[0]) % size == 0 and len(x) == size for (x,) in held_out.batches(size))
    whole = [x for (x,) in fitted.batches(size) if len(x) == size]
    assert len(whole) == count // size - held // size
    assert all(int(x[0]) % size == 0 for x in whole)


def test_too_few_are_not_split(any_batch: Program) -> None:
    for source, program in ((numbered(FEWEST - 1), any_batch), (numbered(60), fixed(32)), (numbered(16), fixed(16))):
        fitted, held_out = split(source, program)
        assert fitted is source
        assert held_out is None


def test_of_a_long_stream_only_the_start_is_counted_and_judges(any_batch: Program) -> None:
    drawn = []

    def stream() -> Iterator[Batch]:
        for number in range(100_000):
            drawn.append(number)
            yield (torch.full((8, 1), float(number)),)

    class Stream:
        def __iter__(self) -> Iterator[Batch]:
            return stream()

    _, held_out = split(Samples.open(Stream(), ["x"]), any_batch)
    assert len(drawn) < 100
    assert len(read(held_out, 64)) == 1024
