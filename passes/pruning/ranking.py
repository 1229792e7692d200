"""In which order a group's indices go: the lowest-scored first, and before them what has gone already."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch

Scores = Mapping[int, torch.Tensor]  # by axis, (size,)


@dataclass(frozen=True)
class Ranking:
    """What each index is worth.

    Attributes:
        scores: now; -inf for those that have gone.
        seen: when it was last there.
    """

    scores: Scores
    seen: Scores

    @classmethod
    def of(cls, scores: Scores, earlier: Ranking | None) -> Self:
        """Rank by new scores, after those of the round before (None in the first)."""
        seen = dict(scores)
        if earlier is not None:
            for axis, values in scores.items():
                seen[axis] = torch.where(torch.isneginf(values), earlier.seen.get(axis, values), values)
        return cls(scores, seen)

    def without(self, axes: Collection[int]) -> Ranking:
        """Return the ranking of the other groups."""
        left = [axis for axis in self.scores if axis not in axes]
        return Ranking({axis: self.scores[axis] for axis in left}, {axis: self.seen[axis] for axis in left})

    def kept(self, counts: Mapping[int, int]) -> dict[int, list[int]]:
        """Return the sorted best indices of every axis that does not keep all."""
        orders = self._orders
        return {axis: sorted(orders[axis][:n].tolist()) for axis, n in counts.items() if n < len(orders[axis])}

    @cached_property
    def descending(self) -> Scores:
        """What the indices are worth, best first; of those that have gone what they were, but no more than the rest."""
        return {axis: self.seen[axis][order].cummin(0).values for axis, order in self._orders.items()}

    @cached_property
    def _orders(self) -> Scores:
        """The indices, best first; of equals the lower one."""
        found = {}
        for axis, values in self.scores.items():
            once_there = torch.argsort(self.seen[axis], descending=True, stable=True)
            found[axis] = once_there[torch.argsort(values[once_there], descending=True, stable=True)]
        return found
