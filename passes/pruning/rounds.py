"""Deciding what goes: rank, allocate, remove, refit, and again for as many rounds as asked.

In round k of n a share k/n of the removal is carried out, and what is left is ranked anew on the program as it is by
then, refitted where there is data. Where a target leaves room, a round gives back what an earlier one removed, unless
what was left has been trained since. Indices are those of the original throughout, so the rounds make one plan, and
applying it is one removal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch

from graphopt.axes.groups import Group
from graphopt.axes.infer import Axes
from graphopt.axes.rewrite import remove
from graphopt.ir.plain_data import Json
from graphopt.ir.program import Program
from graphopt.measure.budget import Guard, Meter
from graphopt.passes.layers.between_steps import recovered
from graphopt.passes.pruning.alignment import multiples
from graphopt.passes.pruning.allocation import Allocation, Counts
from graphopt.passes.pruning.choice import Choice
from graphopt.passes.pruning.compensation import Compensation
from graphopt.passes.pruning.criteria import rank
from graphopt.passes.pruning.guard import unpaying
from graphopt.passes.pruning.options import PruneOptions
from graphopt.passes.pruning.ranking import Ranking
from graphopt.passes.pruning.reconstruction import reconstruct, with_tensors
from graphopt.passes.pruning.search import Trials, least_removal
from graphopt.passes.pruning.standing import Standing
from graphopt.passes.pruning.trained import Trained, differing
from graphopt.pipeline.context import Context
from graphopt.pipeline.options import exact
from graphopt.pipeline.plan import Refusal

_MOST_OF_IT = 0.8  # of what is asked for: 0.5 that comes to less than 0.4 is another ratio, which is worth a note


@dataclass
class Decision:
    """What was decided about a program.

    Attributes:
        kept: by axis the sorted indices that stay, for those that lose any; in the order of the groups.
        refusals: groups left whole and layers left as they are, with the reason.
        fitted: what the data makes of the tensors that are left.
        measured: output quality, shares of the original and times that steered the decision.
        notes: what was asked for and not reached.
    """

    kept: dict[int, list[int]] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)
    fitted: Compensation = field(default_factory=Compensation)
    measured: dict[str, Json] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def decide(program: Program, axes: Axes, choice: Choice, options: PruneOptions, ctx: Context) -> Decision:
    """Choose the indices that stay and the tensors they should have.

    Args:
        program: before the removal.
        axes: of it.
        choice: the groups that may lose indices.
        options: what the user asked for.
        ctx: data, randomness, and the runtime to time in.

    Raises:
        PassError: a target cannot be met.
        DataError: the criterion needs data and there is none.
    """
    return _Rounds(program, axes, choice, options, ctx).run()


class _Rounds:
    def __init__(self, program: Program, axes: Axes, choice: Choice, options: PruneOptions, ctx: Context) -> None:
        self._program, self._axes, self._choice = program, axes, choice
        self._options, self._ctx = options, ctx
        self._groups: Sequence[Group] = choice.groups
        self._wanted = options.budget.shares(ctx.original)
        self._meter = Meter(ctx.original, ctx.need_timer("prune") if "latency" in self._wanted else None)
        self._left: dict[str, float] = {}  # of the original, by unit that is limited
        self._found = Decision()
        self._trained: Trained | None = None
        self._reasons: dict[int, tuple[str, str]] = {}  # by axis: why it is left whole, and how that is counted

    def run(self) -> Decision:
        """Go through the rounds."""
        steps = self._options.steps
        if self._options.epochs is not None:
            self._ctx.need_samples("prune", "to recover on between steps (without `epochs` none is needed)")
            self._ctx.need_held_out("prune")
        ranking: Ranking | None = None
        for step in range(1, steps + 1):
            part = Fraction(step, steps)
            ranking = Ranking.of(self._scores(), ranking)
            counts = self._counts(ranking, part)
            if step == steps and self._options.guard == "measure":
                ranking, counts = self._guarded(ranking, counts)
            self._found.kept = ranking.kept(counts)
            self._found.fitted, quality = self._fit()
            if self._options.epochs is not None:
                self._train(step, last=step == steps)
        assert ranking is not None
        if self._options.epochs is not None and self._trained is None and self._found.kept:
            self._found.notes.append(
                f"epochs={self._options.epochs}: all that goes goes in the last step, so nothing was trained in between"
            )
        self._found.measured.update({f"{name} left": share for name, share in self._left.items()})
        if self._meter.timed:
            self._found.measured["latencies tried"] = list(self._meter.timed)
        self._found.measured.update(quality)
        self._say_what_is_left_whole(ranking.scores, counts)
        self._say_what_overrides_leave(counts)
        self._say_what_rounding_leaves(ranking.scores, counts)
        return self._found

    def _scores(self) -> dict[int, torch.Tensor]:
        """Score every group on the program as it is now."""
        program = self._program
        if self._trained is not None:
            program = self._trained.program
        elif self._found.kept:
            program = with_tensors(self._pruned(), self._found.fitted.tensors, "prune")
        standing = Standing(program, self._axes, self._found.kept, self._ctx, self._options.samples)
        scores, reasons = rank(self._options.criterion, standing, self._groups)
        for axis, reason in reasons.items():
            self._reasons[axis] = (reason, f"cannot be ranked by {self._options.criterion}")
        return scores

    def _counts(self, ranking: Ranking, part: Fraction) -> Counts:
        """Return how many indices each group keeps after a part of the removal."""
        allocation = self._allocation()
        if not self._wanted:
            return allocation.counts(exact(self._options.ratio) * part, ranking.scores, part)
        shares = dict(self._wanted)
        if part < 1:
            shares = {name: float(1 - (1 - exact(share)) * part) for name, share in shares.items()}
        trials = Trials(self._program, self._axes, self._options.budget, shares, self._meter, self._ctx.progress)
        counts = least_removal(allocation, ranking, trials, part)
        self._left = trials.left(counts)
        return counts

    def _allocation(self) -> Allocation:
        groups = [group for group in self._groups if group.axis not in self._reasons]
        alignment = self._options.round_to
        return Allocation(
            groups,
            self._options.scope,
            ratios=self._choice.ratios,
            multiples=multiples(groups, self._ctx.channel_multiple)
            if alignment is None
            else dict.fromkeys((group.axis for group in groups), alignment),
            least=self._options.min_channels,
            left={axis: len(kept) for axis, kept in self._found.kept.items()},
            returns=self._trained is None,
        )

    def _guarded(self, ranking: Ranking, counts: Counts) -> tuple[Ranking, Counts]:
        """Leave whole what does not pay; what a target then still asks for comes from the other groups."""
        guard = Guard(self._ctx.need_timer("prune"))
        unpaid = unpaying(self._program, self._axes, self._groups, counts, guard, self._ctx.progress)
        self._found.measured["time of all"] = {name: list(times) for name, times in guard.measured.items()}
        if not unpaid:
            return ranking, counts
        for axis, reason in unpaid.items():
            self._reasons[axis] = (f"does not pay in the runtime: {reason}", "does not pay in the runtime")
        for axis in unpaid:
            self._found.kept.pop(axis, None)
        ranking = ranking.without(unpaid)
        if self._wanted:
            return ranking, self._counts(ranking, Fraction(1))
        return ranking, {axis: count for axis, count in counts.items() if axis not in unpaid}

    def _fit(self) -> tuple[Compensation, dict[str, float]]:
        """Let the data say what the tensors that are left should be."""
        if not self._found.kept or not self._options.compensate:
            return Compensation(), {}
        if self._ctx.samples is None:
            return Compensation(refusals=[Refusal("compensation", "not compensated: there is no data")]), {}
        limit = self._options.samples
        if self._trained is None:
            return reconstruct(self._program, self._pruned, self._axes, self._found.kept, self._ctx, limit, "prune")
        axes, kept = self._trained.own(self._found.kept)
        if not kept:
            return Compensation(), {}
        before, pruned = self._trained.program, self._trained.without(self._found.kept)
        return reconstruct(before, pruned, axes, kept, self._ctx, limit, "prune")

    def _train(self, step: int, *, last: bool) -> None:
        """Train what is left, but after the last round, whose tensors then are those of what was trained."""
        kept, fitted = dict(self._found.kept), self._found.fitted
        if not kept:
            return
        pruned = self._pruned if self._trained is None else self._trained.without(kept)
        program = with_tensors(pruned(), fitted.tensors, "prune")
        if last:
            fitted.tensors = differing(program, self._pruned())
            return
        assert self._options.epochs is not None
        program, plan = recovered(program, self._options.epochs, self._ctx, step)
        self._found.measured[f"recovery after step {step}"] = dict(plan.measured)
        self._trained = Trained(program, self._axes, kept)

    def _pruned(self) -> Program:
        gm = remove(self._program.graph_module, self._axes, self._found.kept, "prune")
        return self._program.with_graph(gm)

    def _say_what_is_left_whole(self, scores: Mapping[int, torch.Tensor], counts: Counts) -> None:
        allocation = replace(self._allocation(), left={})
        ratio = self._options.ratio
        short = {} if self._wanted else allocation.short(ratio, scores)
        for group in self._groups:
            if group.axis in self._reasons:
                self._found.refusals.append(Refusal(group.name, *self._reasons[group.axis]))
            elif group.axis not in self._found.kept:
                self._found.refusals.append(self._left_whole(group, allocation.multiples[group.axis]))
            elif group.axis in short:
                text = f"keeps {counts[group.axis]} of {group.size}, not {short[group.axis]}"
                minimum = f"minimum is {self._options.min_channels}"
                self._found.refusals.append(Refusal(group.name, f"{text}: {minimum}", "held at the minimum"))

    def _say_what_overrides_leave(self, counts: Counts) -> None:
        """Say so where groups with a ratio of their own take the program below the target without any other."""
        lose = [group.axis for group in self._groups if counts.get(group.axis, group.size) < group.size]
        below = [name for name, share in self._wanted.items() if self._left[name] < share]
        if not lose or not below or any(axis not in self._choice.ratios for axis in lose):
            return
        budget, original = self._options.budget, self._ctx.original
        said = (f"{budget.amount(name, self._left[name], original)} ({budget.limit(name)} asked)" for name in below)
        text = f"the overrides alone leave {' and '.join(said)}; nothing else is removed"
        self._found.refusals.append(Refusal("ratios", text, "overrides alone go below the target"))

    def _say_what_rounding_leaves(self, scores: Mapping[int, torch.Tensor], counts: Counts) -> None:
        """Say so where a ratio asks for much more than goes, because counts are rounded up."""
        if self._wanted:
            return
        rounded = self._allocation()
        exactly = replace(rounded, left={}, multiples={}).counts(self._options.ratio, scores)
        total = sum(group.size for group in rounded.groups)
        asked = total - sum(exactly.values())
        gone = total - sum(counts[axis] for axis in exactly)
        if gone < _MOST_OF_IT * asked:
            multiple = max(rounded.multiples[axis] for axis in exactly)
            self._found.notes.append(
                f"ratio={self._options.ratio:g}: {gone / total:.0%} of the indices go, without rounding it were "
                f"{asked / total:.0%}: counts are rounded up to multiples of {multiple}, which kernels like; "
                "round_to=1 removes what is asked"
            )

    def _left_whole(self, group: Group, multiple: int) -> Refusal:
        options = self._options
        own = self._choice.ratios.get(group.axis)
        if group.size <= options.min_channels:
            text = f"{group.size} left, minimum is {options.min_channels}"
            return Refusal(group.name, text, "already at the minimum")
        if own is None and self._wanted:
            return Refusal(group.name, f"the target is met with all {group.size} of it", "not needed for the target")
        if own is None and options.scope == "global":
            return Refusal(
                group.name, f"all {group.size} score above the global threshold", "above the global threshold"
            )
        ratio = options.ratio if own is None else own
        return Refusal(
            group.name,
            f"removing {ratio:.0%} of {group.size} leaves all of them after rounding to {multiple}",
            "too small after rounding",
        )
