"""A pool of samples that training draws batches from, in any order.

Samples come as batches, and batches of text may each have their own length: samples of one shape share a bucket,
and a batch is drawn from one bucket.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphopt.data.batches import Batch, SampleSource

Index = tuple[int, torch.Tensor]  # bucket, and which of its samples

_READ_SIZE = 256  # samples read at once


@dataclass(frozen=True)
class Pool:
    """Samples in memory.

    Attributes:
        buckets: one tensor per program input, first axis samples, for every combination of shapes.
    """

    buckets: tuple[Batch, ...]

    @classmethod
    def read(cls, samples: SampleSource, limit: int | None) -> Pool:
        """Read at most `limit` samples."""
        found: dict[tuple[object, ...], list[Batch]] = {}
        for batch in samples.batches(_READ_SIZE, limit):
            found.setdefault(tuple((part.shape[1:], part.dtype) for part in batch), []).append(batch)
        return cls(tuple(tuple(map(torch.cat, zip(*batches, strict=True))) for batches in found.values()))

    @property
    def count(self) -> int:
        """How many samples there are."""
        return sum(len(bucket[0]) for bucket in self.buckets)

    def split(self, held_out: int, generator: torch.Generator) -> tuple[Pool, Pool]:
        """Split into a pool to train on and one of `held_out` samples, drawn at random."""
        chosen = torch.randperm(self.count, generator=generator)[:held_out]
        away = torch.zeros(self.count, dtype=torch.bool)
        away[chosen] = True
        masks = torch.split(away, [len(bucket[0]) for bucket in self.buckets])
        return self._where([~mask for mask in masks]), self._where(masks)

    def batches(self, size: int, generator: torch.Generator | None = None, *, fixed: bool = False) -> list[Index]:
        """Divide the samples into batches of at most `size`, as even as they can be, each within one bucket.

        Args:
            size: samples per batch.
            generator: shuffles samples and then batches; None keeps the order.
            fixed: every batch must have `size` samples, as a program of static batch asks; the rest are left out.
        """
        drawn: list[Index] = []
        for bucket, parts in enumerate(self.buckets):
            count = len(parts[0])
            order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
            pieces = torch.split(order, size) if fixed else order.tensor_split(math.ceil(count / size))
            drawn += [(bucket, piece) for piece in pieces if len(piece) == size or not fixed]
        if generator is None:
            return drawn
        return [drawn[at] for at in torch.randperm(len(drawn), generator=generator)]

    def take(self, index: Index) -> Batch:
        """Return one batch."""
        bucket, samples = index
        return tuple(part[samples] for part in self.buckets[bucket])

    def _where(self, masks: Sequence[torch.Tensor]) -> Pool:
        kept = [
            tuple(part[mask] for part in bucket) for bucket, mask in zip(self.buckets, masks, strict=True) if mask.any()
        ]
        return Pool(tuple(kept))
