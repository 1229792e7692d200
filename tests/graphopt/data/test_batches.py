"""Batches that a program takes: which there are, and how many samples are read for them."""

from __future__ import annotations

import pytest
import torch

from graphopt.data.batches import whole_batches, whole_labelled_batches
from graphopt.testing import TensorSamples

SAMPLES = TensorSamples((torch.arange(20.0).view(-1, 1),), torch.arange(20))


@pytest.mark.parametrize(
    ("limit", "fixed", "sizes"),
    [
        (None, None, [8, 8, 4]),
        (10, None, [8, 2]),
        (None, 6, [6, 6, 6]),
        (13, 6, [6, 6]),
        (4, 6, [6]),  # a limit is no reason to read nothing
        (4, 21, []),
    ],
)
def test_only_whole_batches_and_at_least_one(limit: int | None, fixed: int | None, sizes: list[int]) -> None:
    assert [len(batch[0]) for batch in whole_batches(SAMPLES, 8, limit, fixed=fixed)] == sizes
    pairs = list(whole_labelled_batches(SAMPLES, 8, limit, fixed=fixed))
    assert [len(batch[0]) for batch, _ in pairs] == sizes
    assert all(labels is not None and torch.equal(batch[0].flatten(), labels) for batch, labels in pairs)
