"""A pool of samples that training draws batches from, in any order.

Samples come as batches, and batches of text may each have their own length: samples of one shape share a bucket,
and a batch is drawn from one bucket.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphopt.data.batches import Batch, SampleSource, Takes, any_number, batch_count, joined, kind, pieces, taken

Index = tuple[int, torch.Tensor]  # bucket, and which of its samples

_READ_SIZE = 256  # samples read at once


@dataclass(frozen=True)
class Pool:
    """Samples in memory.

    Attributes:
        buckets: one tensor per program input, first axis samples, for every `kind` of batch.
    """

    buckets: tuple[Batch, ...]

    @classmethod
    def read(cls, samples: SampleSource, limit: int | None) -> Pool:
        """Read at most `limit` samples."""
        found: dict[object, list[Batch]] = {}
        for batch in samples.batches(_READ_SIZE, limit):
            found.setdefault(kind(batch), []).append(batch)
        return cls(tuple(joined(batches) for batches in found.values()))

    @property
    def count(self) -> int:
        """How many samples there are."""
        return sum(batch_count(bucket) for bucket in self.buckets)

    def batches(
        self,
        size: int,
        generator: torch.Generator | None = None,
        *,
        takes: Takes = any_number,
        fewest: int = 1,
    ) -> list[Index]:
        """Divide the samples into batches of at most `size`, as even as they can be, each within one bucket.

        Args:
            size: samples per batch.
            generator: shuffles samples and then batches; None keeps the order.
            takes: how many samples the program takes, see `Program.takes`; those that do not fill a batch are left out.
            fewest: samples of a batch: it is rather larger than smaller, and a bucket of fewer is left out.
        """
        drawn: list[Index] = []
        for bucket, parts in enumerate(self.buckets):
            count = batch_count(parts)
            order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
            if count < fewest:
                continue
            calls: Sequence[torch.Tensor] = order.tensor_split(min(math.ceil(count / size), count // fewest))
            if any(takes(len(call)) != len(call) for call in calls):
                calls = [order[piece] for piece in pieces(count, takes(min(size, count)), takes)]
            drawn += [(bucket, call) for call in calls]
        if generator is None:
            return drawn
        return [drawn[at] for at in torch.randperm(len(drawn), generator=generator)]

    def left_out(self, fewest: int) -> str:
        """Say how many samples are in buckets of fewer than so many, "" where none are."""
        alone = sum(count for bucket in self.buckets if (count := batch_count(bucket)) < fewest)
        said = f"alone in their shape, where BatchNorm has no variance: {alone} of {self.count} samples are left out"
        return said if alone else ""

    def take(self, index: Index) -> Batch:
        """Return one batch."""
        bucket, samples = index
        return taken(self.buckets[bucket], samples)
