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
from graphopt.measure.cost import Cost, cost
from graphopt.passes.pruning.allocation import Allocation, Counts
from graphopt.passes.pruning.giving_back import give_back
from graphopt.passes.pruning.ranking import Ranking
from graphopt.passes.pruning.sizes import Sizes
from graphopt.pipeline.context import Context, Progress

logger = logging.getLogger(__name__)

_LEVELS_MEASURED = 64  # levels tried where each takes lowering and timing
_TRIES_MEASURED = 16  # multiples tried to give back, likewise
_STATIC = ("parameters", "flops", "bytes")
CALLED = {"parameters": "parameters", "flops": "FLOPs", "bytes": "bytes", "latency": "latency"}

Shares = Mapping[str, float]  # of the original, by what of it: "flops": 0.48


@dataclass
class Meter:
    """Says what share of the original a choice of counts leaves.

    Attributes:
        program: the program that is pruned.
        axes: of it.
        wanted: the shares not to exceed.
        ctx: the original, and the runtime to time in.
        tried: the latencies measured so far, for the plan.
        sizes: predicts costs while searching; None measures each.
    """

    program: Program
    axes: Axes
    wanted: Shares
    ctx: Context
    tried: list[float] = field(default_factory=list)
    sizes: Sizes | None = None
    _known: dict[tuple[tuple[int, int], ...], dict[str, float]] = field(default_factory=dict)

    def shares(self, counts: Counts) -> dict[str, float]:
        """Measure the share that is left of everything that has a target."""
        key = tuple(counts.items())
        if key not in self._known:
            self._known[key] = self._measure(counts)
        return self._known[key]

    def meets(self, counts: Counts) -> bool:
        """Tell whether no target is exceeded, as far as `sizes` can say where there are any."""
        shares = self.shares(counts) if self.sizes is None else self._shares(self.sizes.cost(_kept(counts)))
        return self._within(shares)

    def confirms(self, counts: Counts) -> bool:
        """Measure whether no target is exceeded."""
        return self._within(self.shares(counts))

    def _within(self, shares: Shares) -> bool:
        return all(shares[name] <= share for name, share in self.wanted.items())

    def _shares(self, now: Cost) -> dict[str, float]:
        before = cost(self.ctx.original)
        return {name: getattr(now, name) / max(getattr(before, name), 1) for name in _STATIC if name in self.wanted}

    def _measure(self, counts: Counts) -> dict[str, float]:
        pruned = self.program.with_graph(remove(self.program.graph_module, self.axes, _kept(counts)))
        found = self._shares(cost(pruned))
        if "latency" in self.wanted:
            found["latency"] = self.ctx.need_timer("prune")(pruned, self.ctx.original).median
            self.tried.append(found["latency"])
        return found


def least_removal(allocation: Allocation, ranking: Ranking, meter: Meter, part: Fraction) -> Counts:
    """Return the counts of the lowest level that meets the targets, and no less than meets them.

    Args:
        allocation: how levels become counts.
        ranking: the worth of each index.
        meter: says what counts leave.
        part: of the ratios that the level does not decide about, as much is carried out.

    Raises:
        PassError: even the highest level exceeds a target; the message says what it leaves.
    """
    levels = allocation.levels(ranking.scores)
    if "latency" in meter.wanted and len(levels) > _LEVELS_MEASURED:
        places = (index * (len(levels) - 1) // (_LEVELS_MEASURED - 1) for index in range(_LEVELS_MEASURED))
        levels = [levels[place] for place in places]
    last = allocation.counts(levels[-1], ranking.scores, part)
    if not meter.confirms(last):
        raise PassError(_unmet(meter, last, allocation))
    if "latency" not in meter.wanted:
        sizes = Sizes(meter.program, meter.axes)
        if sizes.complete:
            found = _search(allocation, levels, ranking, replace(meter, sizes=sizes), part)
            if meter.confirms(found):
                return found
            logger.debug("the operations predicted were not those counted; measuring every time")
    return _search(allocation, levels, ranking, meter, part)


def _search(
    allocation: Allocation,
    levels: Sequence[Fraction],
    ranking: Ranking,
    meter: Meter,
    part: Fraction,
) -> Counts:
    def counts(index: int) -> Counts:
        return allocation.counts(levels[index], ranking.scores, part)

    level = _first(len(levels) - 1, lambda index: meter.meets(counts(index)), meter.ctx.progress)
    found = counts(0) if level == 0 else _step_by_step(counts(level - 1), counts(level), ranking.scores, meter)
    tries = _TRIES_MEASURED if "latency" in meter.wanted else None
    return give_back(found, allocation, ranking.descending, meter.meets, tries)


def _step_by_step(more: Counts, fewer: Counts, scores: Mapping[int, torch.Tensor], meter: Meter) -> Counts:
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

    needed = _first(len(steps), lambda count: meter.meets(after(steps[:count])), meter.ctx.progress)
    taken = steps[:needed]
    if meter.sizes is not None:
        for axis in reversed(taken[:-1]):
            without = [other for other in taken if other != axis]
            if meter.meets(after(without)):
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


def _unmet(meter: Meter, counts: Counts, allocation: Allocation) -> str:
    shares = meter.shares(counts)
    name = next(name for name, share in meter.wanted.items() if shares[name] > share)
    groups = len(allocation.groups)
    if not groups:
        return (
            f"Pass `prune` cannot bring the {CALLED[name]} to {meter.wanted[name]:.1%} of the original's: no group of "
            f"this model may lose an index, which leaves {shares[name]:.1%}. The plan of `prune:ratio=0` says why."
        )
    raised = max(allocation.multiples.values(), default=1)
    return (
        f"Pass `prune` cannot bring the {CALLED[name]} to {meter.wanted[name]:.1%} of the original's: with as much "
        f"removed of {groups} groups as min_channels={allocation.least} and multiples of up to {raised} allow, "
        f"{shares[name]:.1%} are left. Ask for no less than that, or lower round_to or min_channels."
    )
