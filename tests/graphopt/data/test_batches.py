"""Batches that a program takes: which there are, and how many samples are read for them."""

from __future__ import annotations

import pytest
import torch

from graphopt.data.batches import Takes, whole_batches, whole_labelled_batches
from graphopt.ir.batch_sizes import BatchSizes
from graphopt.ir.signature import TensorSpec
from graphopt.ir.sizes import ANY, SizeRange
from graphopt.testing import TensorSamples

SAMPLES = TensorSamples((torch.arange(20.0).view(-1, 1),), torch.arange(20))


def numbers(first: int | str, sizes: SizeRange = ANY) -> Takes:
    return BatchSizes([TensorSpec("x", (first, 1), torch.float32, (sizes, ANY))]).taken


@pytest.mark.parametrize(
    ("limit", "takes", "sizes"),
    [
        (None, numbers("batch"), [8, 8, 4]),
        (10, numbers("batch"), [8, 2]),
        (None, numbers(6), [6, 6, 6]),
        (13, numbers(6), [6, 6]),
        (4, numbers(6), [6]),  # a limit is no reason to read nothing
        (4, numbers(21), []),
        (None, numbers("batch", SizeRange(0, 5)), [5, 5, 5, 5]),
        (None, numbers("batch", SizeRange(5)), [8, 8]),
        (7, numbers("2*half"), [6]),
        (None, numbers("3*third", SizeRange(6)), [6, 6, 6]),
        (4, numbers("batch", SizeRange(12)), [12]),
    ],
)
def test_only_whole_batches_and_at_least_one(limit: int | None, takes: Takes, sizes: list[int]) -> None:
    assert [len(batch[0]) for batch in whole_batches(SAMPLES, 8, limit, takes=takes)] == sizes
    pairs = list(whole_labelled_batches(SAMPLES, 8, limit, takes=takes))
    assert [len(batch[0]) for batch, _ in pairs] == sizes
    assert all(labels is not None and torch.equal(batch[0].flatten(), labels) for batch, labels in pairs)
