"""Giving back what a target leaves room for.

Indices go in multiples, and one multiple of a wide group can take a program far below its target. What has gone then
comes back, the highest-scored multiple of all groups first, while the targets are met; a group whose next multiple
would exceed one gets no more. In what is left, one more multiple of any group would exceed a target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from graphopt.passes.pruning.allocation import Allocation, Counts


class _Multiple(NamedTuple):
    """A step back of one group, from what the step before it left."""

    axis: int
    keeps: int  # how many indices the group then has


def give_back(
    counts: Counts,
    allocation: Allocation,
    worths: Mapping[int, torch.Tensor],
    meets: Callable[[Counts], bool],
    tries: int | None = None,
) -> Counts:
    """Return the counts with as much given back as the targets allow.

    Args:
        counts: how many indices each group keeps, within the targets.
        allocation: the groups, their multiples, and which have a ratio of their own, that stay as they are.
        worths: by axis what each index is worth, best first, (size,).
        meets: tells whether counts are within the targets. Larger counts are taken to be no more so.
        tries: how often it is asked at most; None for as often as it takes.
    """
    waiting = _multiples(counts, allocation, worths)
    found, together, asked = dict(counts), 1, 0
    while waiting and (tries is None or asked < tries):
        asked += 1
        next_ones = waiting[:together]
        candidate = {**found, **{step.axis: step.keeps for step in next_ones}}
        if meets(candidate):
            found, waiting, together = candidate, waiting[together:], 2 * together
        elif len(next_ones) > 1:
            together = len(next_ones) // 2
        else:
            waiting = [step for step in waiting if step.axis != next_ones[0].axis]
    return found


def _multiples(counts: Counts, allocation: Allocation, worths: Mapping[int, torch.Tensor]) -> list[_Multiple]:
    """Return every step back that there is, the highest-scored first; those of a group in order."""
    steps: list[tuple[float, _Multiple]] = []
    for group in allocation.groups:
        if group.axis not in counts or group.axis in allocation.ratios:
            continue
        multiple, count = allocation.multiples.get(group.axis, 1), counts[group.axis]
        while count < allocation.most(group):
            larger = min(multiple * (count // multiple + 1), allocation.most(group))
            steps.append((float(worths[group.axis][count:larger].mean()), _Multiple(group.axis, larger)))
            count = larger
    return [step for _, step in sorted(steps, key=lambda scored: -scored[0])]
