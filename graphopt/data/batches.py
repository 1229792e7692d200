"""Batches of samples, and what can be iterated over for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

Batch = tuple[torch.Tensor, ...]  # one tensor per program input, first axis: samples


class SampleSource(Protocol):
    """Calibration data: can be iterated over as often as passes like, in a fixed order."""

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """Yield batches of at most `batch_size` samples, `limit` samples in all."""

    def labelled_batches(
        self, batch_size: int, limit: int | None = None
    ) -> Iterator[tuple[Batch, torch.Tensor | None]]:
        """Yield pairs of inputs and labels as `batches` does; labels are None where the data has none."""


def whole_batches(samples: SampleSource, size: int, limit: int | None, *, fixed: int | None) -> Iterator[Batch]:
    """Yield batches that a program takes, without those that do not fill its batch size.

    Args:
        samples: what is read.
        size: samples per batch, where any number fits.
        limit: samples read in all.
        fixed: how many samples the program takes, None where any number fits.
    """
    for batch in samples.batches(fixed or size, limit):
        if fixed in (None, len(batch[0])):
            yield batch
