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
