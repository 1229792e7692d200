"""Batches of samples, and what can be iterated over for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch

# One tensor per program input, first axis: samples. A tensor without axes holds for every sample.
Batch = tuple[torch.Tensor, ...]
Labelled = tuple[Batch, torch.Tensor | None]


class SampleSource(Protocol):
    """Calibration data: can be iterated over as often as passes like, in a fixed order."""

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """Yield batches of at most `batch_size` samples, `limit` samples in all."""

    def labelled_batches(self, batch_size: int, limit: int | None = None) -> Iterator[Labelled]:
        """Yield pairs of inputs and labels as `batches` does; labels are None where the data has none."""


Takes = Callable[[int], int]  # the number of samples a call takes that is nearest below another, else the smallest


def any_number(samples: int) -> int:
    """Return the number of samples that is taken by what takes any."""
    return samples


def pieces(count: int, size: int, takes: Takes) -> Iterator[slice]:
    """Cut samples into calls of `size`; those left over that fill no call are left out.

    Args:
        count: how many there are.
        size: samples per call, a number that is taken.
        takes: see `Program.takes`.
    """
    for start in range(0, count, size):
        left = count - start
        if (fits := takes(min(size, left))) <= left:
            yield slice(start, start + fits)


def whole_batches(samples: SampleSource, size: int, limit: int | None, *, takes: Takes) -> Iterator[Batch]:
    """Yield batches that a program takes, without those that do not fill its batch size.

    Args:
        samples: what is read.
        size: samples per batch, as far as they fit.
        limit: samples read in all; where the program takes more at once, as many as it takes.
        takes: see `Program.takes`.
    """
    size = _size(size, limit, takes)
    for batch in samples.batches(size, _limit(limit, size)):
        for piece in pieces(batch_count(batch), size, takes):
            yield taken(batch, piece)


def whole_labelled_batches(samples: SampleSource, size: int, limit: int | None, *, takes: Takes) -> Iterator[Labelled]:
    """Yield pairs of inputs and labels as `whole_batches` does; labels are None where the data has none."""
    size = _size(size, limit, takes)
    for batch, labels in samples.labelled_batches(size, _limit(limit, size)):
        for piece in pieces(batch_count(batch), size, takes):
            yield taken(batch, piece), None if labels is None else labels[piece]


def _size(size: int, limit: int | None, takes: Takes) -> int:
    return takes(size if limit is None else min(size, limit))


def _limit(limit: int | None, size: int) -> int | None:
    return None if limit is None else max(limit, size)


def batch_count(batch: Sequence[torch.Tensor]) -> int:
    """Return how many samples a batch holds: one where no tensor has an axis."""
    return next((len(tensor) for tensor in batch if tensor.dim()), 1)


def taken(batch: Batch, samples: slice | torch.Tensor) -> Batch:
    """Return some samples of a batch."""
    return tuple(tensor[samples] if tensor.dim() else tensor for tensor in batch)


def joined(batches: Sequence[Batch]) -> Batch:
    """Join batches to one; what has no axes is the same in all."""
    return tuple(torch.cat(parts) if parts[0].dim() else parts[0] for parts in zip(*batches, strict=True))


def kind(batch: Batch) -> object:
    """Return what batches that can be joined share: dtypes, shapes but for the count, values that hold for all."""
    return tuple((tensor.dtype, tensor.shape[1:] if tensor.dim() else tensor.item()) for tensor in batch)


def rebatched(pieces: Iterable[Labelled], size: int) -> Iterator[Labelled]:
    """Cut and join pieces to batches of `size` samples; pieces of unlike shapes are not joined."""
    held: list[Labelled] = []
    count = 0
    for inputs, labels in pieces:
        while left := batch_count(inputs):
            if held and _kinds(held[-1]) != _kinds((inputs, labels)):
                yield _join(held)
                held, count = [], 0
            take = min(size - count, left)
            held.append((taken(inputs, slice(take)), None if labels is None else labels[:take]))
            count += take
            inputs, labels = taken(inputs, slice(take, None)), None if labels is None else labels[take:]
            if count == size:
                yield _join(held)
                held, count = [], 0
    if held:
        yield _join(held)


def _kinds(piece: Labelled) -> tuple[object, object]:
    return kind(piece[0]), None if piece[1] is None else kind((piece[1],))


def _join(pieces: Sequence[Labelled]) -> Labelled:
    if len(pieces) == 1:
        return pieces[0]
    labels = [piece[1] for piece in pieces if piece[1] is not None]
    return joined([piece[0] for piece in pieces]), torch.cat(labels) if labels else None
