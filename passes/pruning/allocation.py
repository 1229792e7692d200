"""How many indices each group keeps at a given level of removal.

    local    level r: every group loses a share r of its indices
    global   level r: the lowest share r of all groups' indices goes, wherever they are

Counts are rounded up to the group's multiple, and never below the minimum nor above what is left of the group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import torch

from graphopt.axes.groups import Group
from graphopt.pipeline.options import exact

Level = float | Fraction  # share of what may go that does, from 0 to below 1
Counts = dict[int, int]


@dataclass(frozen=True)
class Allocation:
    """The groups of one pruning and the rules of how many each keeps.

    Attributes:
        groups: those that the level decides about, and those with a ratio of their own.
        scope: how the level is spread.
        ratios: by axis the share that goes whatever the level.
        multiples: by axis what counts are rounded up to.
        least: keep at least so many of every group.
        left: by axis how many are left, where some have gone already.
        returns: whether a target may give back what has gone already.
    """

    groups: Sequence[Group]
    scope: Literal["local", "global"]
    ratios: Mapping[int, float] = field(default_factory=dict)
    multiples: Mapping[int, int] = field(default_factory=dict)
    least: int = 1
    left: Mapping[int, int] = field(default_factory=dict)
    returns: bool = True

    def most(self, group: Group) -> int:
        """Return how many indices a group may have."""
        return group.size if self.returns else self.left.get(group.axis, group.size)

    def counts(self, level: Level, scores: Mapping[int, torch.Tensor], part: Fraction = Fraction(1)) -> Counts:
        """Return how many indices each group that has scores keeps.

        Args:
            level: how much goes.
            scores: by axis the worth of each index, -inf for those that have gone.
            part: of the ratios that the level does not decide about, as much is carried out.
        """
        return {group.axis: self._rounded(group, count) for group, count in self._wanted(level, scores, part)}

    def short(self, level: Level, scores: Mapping[int, torch.Tensor]) -> dict[int, int]:
        """Return by axis the counts that are below the minimum and were raised to it."""
        wanted = ((group, count) for group, count in self._wanted(level, scores, Fraction(1)))
        return {group.axis: count for group, count in wanted if count < min(self.least, group.size)}

    def levels(self, scores: Mapping[int, torch.Tensor]) -> list[Fraction]:
        """Return every level at which a count changes, ascending; 0 first."""
        sizes = [group.size for group in self._level_decides(scores)]
        if self.scope == "global":
            return [Fraction(index, sum(sizes)) for index in range(sum(sizes))] or [Fraction(0)]
        return sorted({Fraction(index, size) for size in sizes for index in range(size)}) or [Fraction(0)]

    def _wanted(self, level: Level, scores: Mapping[int, torch.Tensor], part: Fraction) -> list[tuple[Group, int]]:
        """Return how many of each group are to stay before rounding."""
        free = self._level_decides(scores)
        fixed = [group for group in self.groups if group.axis in scores and group.axis in self.ratios]
        level, own = exact(level), {axis: exact(ratio) * part for axis, ratio in self.ratios.items()}
        wanted = [(group, group.size - math.floor(own[group.axis] * group.size)) for group in fixed]
        if self.scope == "local":
            return [*wanted, *((group, group.size - math.floor(level * group.size)) for group in free)]
        return [*wanted, *zip(free, _above_threshold([scores[group.axis] for group in free], level), strict=True)]

    def _level_decides(self, scores: Mapping[int, torch.Tensor]) -> list[Group]:
        return [group for group in self.groups if group.axis in scores and group.axis not in self.ratios]

    def _rounded(self, group: Group, count: int) -> int:
        multiple = self.multiples.get(group.axis, 1)
        rounded = multiple * math.ceil(max(count, self.least) / multiple)
        return min(rounded, self.left.get(group.axis, group.size))


def _above_threshold(scores: Sequence[torch.Tensor], level: Level) -> list[int]:
    """Return per group how many of its scores are among the highest `1 - level` of all groups' scores."""
    if not scores:
        return []
    owners = torch.cat([torch.full((len(values),), index) for index, values in enumerate(scores)])
    order = torch.argsort(torch.cat(list(scores)), stable=True)
    removed = owners[order[: math.floor(level * len(order))]]
    lost = torch.bincount(removed, minlength=len(scores))
    return [len(values) - int(count) for values, count in zip(scores, lost, strict=True)]
