"""Finding the least removal that meets a target on parameters, FLOPs, bytes or measured latency.

    1. bisection over the levels at which a count changes, for the lowest one that meets every target;
    2. between it and the level below, groups take their step one after another, those that lose least first, until
       the targets are met: bisection over how many of them have;
    3. what the targets then leave room for is given back (`giving_back`).

What is compared is the program with that many indices really removed, so what meets the target here meets it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch

from graphopt.axes.infer import Axes
from graphopt.axes.rewrite import remove
from graphopt.errors import PassError
from graphopt.ir.program import Program
from graphopt.measure.budget import Budget, Meter, Shares, exceeded
from graphopt.passes.pruning.allocation import Allocation, Counts
from graphopt.passes.pruning.giving_back import give_back
from graphopt.passes.pruning.ranking import Ranking
from graphopt.passes.pruning.sizes import Sizes
from graphopt.pipeline.context import Progress

logger = logging.getLogger(__name__)

_LEVELS_MEASURED = 64  # levels tried where each takes lowering and timing
_TRIES_MEASURED = 16  # multiples tried to give back, likewise


@dataclass
class Trials:
    """Says what share of the original a choice of counts leaves.

    Attributes:
        program: the program that is pruned.
        axes: of it.
        budget: what the user asked for, for messages.
        wanted: the shares not to exceed by now.
        meter: measures programs.
        progress: shows how far a search has come.
        sizes: predicts costs while searching; None measures each.
    """

    program: Program
    axes: Axes
    budget: Budget
    wanted: Shares
    meter: Meter
    progress: Progress
    sizes: Sizes | None = None
    _known: dict[tuple[tuple[int, int], ...], dict[str, float]] = field(default_factory=dict)

    def left(self, counts: Counts) -> dict[str, float]:
        """Measure the share that is left of everything that has a target."""
        key = tuple(counts.items())
        if key not in self._known:
            pruned = self.program.with_graph(remove(self.program.graph_module, self.axes, _kept(counts)))
            self._known[key] = self.meter.left(pruned, self.wanted)
        return self._known[key]

    def meets(self, counts: Counts) -> bool:
        """Tell whether no target is exceeded, as far as `sizes` can say where there are any."""
        if self.sizes is None:
            return self.confirms(counts)
        return not exceeded(self.meter.left_of(self.sizes.cost(_kept(counts)), self.wanted), self.wanted)

    def confirms(self, counts: Counts) -> bool:
        """Measure whether no target is exceeded."""
        return not exceeded(self.left(counts), self.wanted)


def least_removal(allocation: Allocation, ranking: Ranking, trials: Trials, part: Fraction) -> Counts:
    """Return the counts of the lowest level that meets the targets, and no less than meets them.

    Args:
        allocation: how levels become counts.
        ranking: the worth of each index.
        trials: say what counts leave.
        part: of the ratios that the level does not decide about, as much is carried out.

    Raises:
        PassError: even the highest level exceeds a target; the message says what it leaves.
    """
    levels = allocation.levels(ranking.scores)
    if "latency" in trials.wanted and len(levels) > _LEVELS_MEASURED:
        places = (index * (len(levels) - 1) // (_LEVELS_MEASURED - 1) for index in range(_LEVELS_MEASURED))
        levels = [levels[place] for place in places]
    last = allocation.counts(levels[-1], ranking.scores, part)
    if not trials.confirms(last):
        raise PassError(_unmet(trials, last, allocation))
    if "latency" not in trials.wanted:
        sizes = Sizes(trials.program, trials.axes)
        if sizes.complete:
            found = _search(allocation, levels, ranking, replace(trials, sizes=sizes), part)
            if trials.confirms(found):
                return found
            logger.debug("the operations predicted were not those counted; measuring every time")
    return _search(allocation, levels, ranking, trials, part)


def _search(
    allocation: Allocation,
    levels: Sequence[Fraction],
    ranking: Ranking,
    trials: Trials,
    part: Fraction,
) -> Counts:
    def counts(index: int) -> Counts:
        return allocation.counts(levels[index], ranking.scores, part)

    level = _first(len(levels) - 1, lambda index: trials.meets(counts(index)), trials.progress)
    found = counts(0) if level == 0 else _step_by_step(counts(level - 1), counts(level), ranking.scores, trials)
    tries = _TRIES_MEASURED if "latency" in trials.wanted else None
    return give_back(found, allocation, ranking.descending, trials.meets, tries)


def _step_by_step(more: Counts, fewer: Counts, scores: Mapping[int, torch.Tensor], trials: Trials) -> Counts:
    """Go from counts that exceed a target to counts that do not, group by group, and no further than needed."""
    losses: list[tuple[float, int]] = []
    for order, (axis, count) in enumerate(more.items()):
        if fewer[axis] < count:
            ranked = scores[axis].sort(descending=True).values
            losses.append((float(ranked[fewer[axis] : count].mean()), order))
    axes = list(more)
    steps = [axes[order] for _, order in sorted(losses)]

    def after(taken: Sequence[int]) -> Counts:
        return {axis: fewer[axis] if axis in taken else count for axis, count in more.items()}

    needed = _first(len(steps), lambda count: trials.meets(after(steps[:count])), trials.progress)
    taken = steps[:needed]
    if trials.sizes is not None:
        for axis in reversed(taken[:-1]):
            without = [other for other in taken if other != axis]
            if trials.meets(after(without)):
                taken = without
    return after(taken)


def _first(count: int, holds: Callable[[int], bool], progress: Progress) -> int:
    """Return the first number below `count` from which on something holds, by bisection; `count` if there is none."""
    low, high = 0, count
    for _ in progress.track(range(count.bit_length()), "searching for what meets the target"):
        middle = (low + high) // 2
        if low == high:
            break
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _kept(counts: Counts) -> dict[int, Sequence[int]]:
    """Return some indices of each axis: costs depend on how many stay, not on which."""
    return {axis: range(count) for axis, count in counts.items()}


def _unmet(trials: Trials, counts: Counts, allocation: Allocation) -> str:
    shares = trials.left(counts)
    name = exceeded(shares, trials.wanted)[0]
    limit, left = trials.budget.limit(name), trials.budget.amount(name, shares[name], trials.meter.original)
    groups = len(allocation.groups)
    if not groups:
        return (
            f"Pass `prune` cannot meet `{limit}`: no group of this model may lose an index, which leaves {left}. "
            "The plan of `prune:ratio=0` says why."
        )
    raised = max(allocation.multiples.values(), default=1)
    return (
        f"Pass `prune` cannot meet `{limit}`: with as much removed of {groups} groups as "
        f"min_channels={allocation.least} and multiples of up to {raised} allow, {left} are left. Ask for no less than "
        "that, or lower round_to or min_channels."
    )
