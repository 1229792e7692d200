"""Batches of samples, and what can be iterated over for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch

Batch = tuple[torch.Tensor, ...]  # one tensor per program input, first axis: samples
Labelled = tuple[Batch, torch.Tensor | None]


class SampleSource(Protocol):
    """Calibration data: can be iterated over as often as passes like, in a fixed order."""

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """Yield batches of at most `batch_size` samples, `limit` samples in all."""

    def labelled_batches(self, batch_size: int, limit: int | None = None) -> Iterator[Labelled]:
        """Yield pairs of inputs and labels as `batches` does; labels are None where the data has none."""


def whole_batches(samples: SampleSource, size: int, limit: int | None, *, fixed: int | None) -> Iterator[Batch]:
    """Yield batches that a program takes, without those that do not fill its batch size.

    Args:
        samples: what is read.
        size: samples per batch, where any number fits.
        limit: samples read in all; where the program takes more at once, as many as it takes.
        fixed: how many samples the program takes, None where any number fits.
    """
    batches = samples.batches(fixed or size, _limit(limit, fixed))
    return (batch for batch in batches if fixed in (None, len(batch[0])))


def whole_labelled_batches(
    samples: SampleSource, size: int, limit: int | None, *, fixed: int | None
) -> Iterator[Labelled]:
    """Yield pairs of inputs and labels as `whole_batches` does; labels are None where the data has none."""
    pairs = samples.labelled_batches(fixed or size, _limit(limit, fixed))
    return (pair for pair in pairs if fixed in (None, len(pair[0][0])))


def _limit(limit: int | None, fixed: int | None) -> int | None:
    return None if limit is None else max(limit, fixed or 0)


def rebatched(pieces: Iterable[Labelled], size: int) -> Iterator[Labelled]:
    """Cut and join pieces to batches of `size` samples; pieces of unlike shapes are not joined."""
    held: list[Labelled] = []
    count = 0
    for inputs, labels in pieces:
        while inputs[0].shape[0]:
            if held and not _joinable(held[-1], (inputs, labels)):
                yield _join(held)
                held, count = [], 0
            take = min(size - count, inputs[0].shape[0])
            held.append((tuple(t[:take] for t in inputs), None if labels is None else labels[:take]))
            count += take
            inputs, labels = tuple(t[take:] for t in inputs), None if labels is None else labels[take:]
            if count == size:
                yield _join(held)
                held, count = [], 0
    if held:
        yield _join(held)


def _joinable(one: Labelled, other: Labelled) -> bool:
    """Tell whether two pieces can be one batch: same shapes but for the number of samples."""
    tensors, others = [*one[0], one[1]], [*other[0], other[1]]
    return all(
        (a is None and b is None)
        or (a is not None and b is not None and a.shape[1:] == b.shape[1:] and a.dtype == b.dtype)
        for a, b in zip(tensors, others, strict=True)
    )


def _join(pieces: Sequence[Labelled]) -> Labelled:
    if len(pieces) == 1:
        return pieces[0]
    inputs = tuple(torch.cat(parts) for parts in zip(*(piece[0] for piece in pieces), strict=True))
    labels = [piece[1] for piece in pieces if piece[1] is not None]
    return inputs, torch.cat(labels) if labels else None
