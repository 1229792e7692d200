"""prune: remove whole channels, hidden units and heads, so that every tensor they touch gets smaller.

    w: (64, 32, 3, 3) -> (48, 32, 3, 3)     v: (128, 64) -> (128, 48)     norm: (64,) -> (48,)

Which dimensions go together is inferred (`graphopt.axes`): an axis that some weight produces and some weight
consumes is a group, and an index leaves every parameter, buffer and literal that carries the group's axis at once.
With calibration data the layers behind are refitted to give what they gave before
(`graphopt.passes.pruning.compensation`).
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field

from graphopt.axes.groups import Group
from graphopt.axes.infer import Axes, infer
from graphopt.axes.masked import check_masked_equivalence
from graphopt.axes.rewrite import remove, slices
from graphopt.context import Context
from graphopt.errors import PassError, UsageError
from graphopt.pass_base import Pass
from graphopt.passes.pruning.compensation import Compensation
from graphopt.passes.pruning.reconstruction import FEWEST, reconstruct, with_tensors
from graphopt.passes.pruning.scores import score
from graphopt.plan import Json, Plan, Refusal
from graphopt.program import Program

Kind = Literal["channels", "hidden", "heads", "head_dim", "width"]


_PARTICULARS = re.compile(r" ?\(`[^`]*`[^)]*\)")  # the node a reason names, which differs from site to site


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """How much goes, and by which measure.

    ratio: share of each group's indices to remove (of all groups' together with scope=global).
    criterion: what makes an index worth keeping: the l1 or l2 norm of its weights, or random as a control.
    scope: rank within each group (local), or all groups against each other (global).
    round_to: round the kept count up to a multiple; none: the targets' channel alignment.
    min_channels: keep at least so many of every group.
    kinds: which kinds of axis may go.
    skip: groups to leave whole, as globs of names like `layer1.*`.
    compensate: with data, refit the layers behind what is removed, so that the model works before any training.
    samples: calibration samples used for that at most.
    """

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.3
    criterion: Literal["l1", "l2", "random"] = "l2"
    scope: Literal["local", "global"] = "local"
    round_to: Annotated[int, Field(ge=1)] | None = None
    min_channels: Annotated[int, Field(ge=1)] = 2
    kinds: tuple[Kind, ...] = ("channels", "hidden", "heads", "head_dim", "width")
    skip: tuple[str, ...] = ()
    compensate: bool = True
    samples: Annotated[int, Field(ge=FEWEST)] = 1024


@dataclass(frozen=True, kw_only=True)
class PruningPlan(Plan):
    """Which indices stay. Tensors: refitted weights, biases and statistics by name, in their new shapes.

    Attributes:
        kept: {parameter or buffer: {dimension: sorted kept indices of the original}}, for what shrinks.
        groups: {group: sorted kept indices of its axis}; what `apply` reads.
        compensated: {weight: {"before": relative squared error of its output on held-out samples, "after": the same
            with the refitted weight, "ridge": strength of the pull to the old one}}.
    """

    kept: Mapping[str, Mapping[int, Sequence[int]]] = field(default_factory=dict)
    groups: Mapping[str, Sequence[int]] = field(default_factory=dict)
    compensated: Mapping[str, Mapping[str, Json]] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Self:
        """Rebuild from JSON, whose keys are text."""
        kept = {
            name: {int(dim): list(indices) for dim, indices in dims.items()}
            for name, dims in data.get("kept", {}).items()
        }
        return super().from_json({**data, "kept": kept}, tensors)


class Prune(Pass[PruneOptions, PruningPlan]):
    """Remove the least important channels, hidden units and heads of every group.

    1. An axis that a weight produces and a weight consumes loses its lowest-scored indices, in every tensor.
    2. Refused: an axis that must stay whole (it reaches an input or output, an operator without a rule, a
       reshape without common factors, nothing consumes it); the reason names what holds it.
    3. Refused: a group so small, or a ratio so low, that rounding leaves it whole.
    4. Refused: a group named in `skip`, or of a kind that is not in `kinds`.
    5. With data, every layer whose input changed is refitted by least squares; refused: one whose weight is shared or
       computed, and one that the held-out samples show to be no better for it.
    """

    name = "prune"
    options_type = PruneOptions
    plan_type = PruningPlan

    def plan(self, program: Program, ctx: Context) -> PruningPlan:
        """Score every group and choose the indices that stay.

        Raises:
            UsageError: a glob in `skip` matches no group.
        """
        axes = infer(program.graph_module)
        groups, refusals = self._wanted(axes)
        generator = ctx.generator(self.name)
        scores = [score(program.graph_module, group, self.options.criterion, generator) for group in groups]
        multiple = self.options.round_to or ctx.channel_multiple
        kept: dict[int, list[int]] = {}
        for group, values, count in zip(groups, scores, self._counts(groups, scores, multiple), strict=True):
            if count < group.size:
                kept[group.axis] = _highest(values, count)
            else:
                refusals.append(_left_whole(group, self.options, multiple))
        named = {group.name: kept[group.axis] for group in groups if group.axis in kept}
        found, quality = self._compensation(program, axes, kept, ctx)
        return self.new_plan(
            sites=named,
            refusals=[*refusals, *found.refusals],
            groups=named,
            kept=slices(axes, kept),
            tensors=found.tensors,
            compensated=found.layers,
            measured=quality,
        )

    def apply(self, program: Program, plan: PruningPlan) -> Program:
        """Remove what the plan does not keep.

        Raises:
            PassError: the plan was made for another program.
        """
        axes = infer(program.graph_module)
        axis_of = {group.name: group.axis for group in axes.groups()}
        missing = [name for name in plan.groups if name not in axis_of]
        if missing:
            raise PassError(f"The plan prunes `{missing[0]}`, which this program does not have. Make the plan again.")
        kept = {axis_of[name]: list(indices) for name, indices in plan.groups.items()}
        if slices(axes, kept) != {name: dict(dims) for name, dims in plan.kept.items()}:
            raise PassError("The plan was made for a program with other weights' shapes. Make the plan again.")
        pruned = program.with_graph(remove(program.graph_module, axes, kept, self.name))
        return with_tensors(pruned, plan.tensors, self.name) if plan.tensors else pruned

    def prove(self, before: Program, after: Program, plan: PruningPlan) -> None:
        """Prove masked equivalence in float64 with all parameters drawn at random.

        That is about the removal alone: what is refitted has other values, which the proof does not look at.
        """
        check_masked_equivalence(
            before.graph_module, after.graph_module, plan.kept, before.example_args, before.example_kwargs
        )

    def _compensation(
        self, program: Program, axes: Axes, kept: Mapping[int, Sequence[int]], ctx: Context
    ) -> tuple[Compensation, dict[str, float]]:
        if not kept or not self.options.compensate:
            return Compensation(), {}
        if ctx.samples is None:
            return Compensation(refusals=[Refusal("compensation", "not compensated: there is no data")]), {}
        pruned = program.with_graph(remove(program.graph_module, axes, kept, self.name))
        return reconstruct(program, pruned, axes, kept, ctx, self.options.samples, self.name)

    def _wanted(self, axes: Axes) -> tuple[list[Group], list[Refusal]]:
        """Return the groups that may be pruned, and a refusal for every axis that may not."""
        refusals = [Refusal(axis.name, axis.reason, _PARTICULARS.sub("", axis.reason)) for axis in axes.refusals()]
        groups = []
        unmatched = list(self.options.skip)
        for group in axes.groups():
            globs = [glob for glob in self.options.skip if fnmatch.fnmatchcase(group.name, glob)]
            unmatched = [glob for glob in unmatched if glob not in globs]
            if globs:
                refusals.append(Refusal(group.name, f"skip={globs[0]}", "named in skip"))
            elif group.kind not in self.options.kinds:
                refusals.append(Refusal(group.name, f"kind `{group.kind}` is not in kinds", "kind not chosen"))
            else:
                groups.append(group)
        if unmatched:
            names = ", ".join(group.name for group in axes.groups()[:5])
            raise UsageError(f"`skip={unmatched[0]}` matches no group of this model. Its groups are {names}, ...")
        return groups, refusals

    def _counts(self, groups: Sequence[Group], scores: Sequence[torch.Tensor], multiple: int) -> list[int]:
        """Return how many indices each group keeps."""
        if self.options.scope == "local":
            wanted = [group.size - math.floor(self.options.ratio * group.size) for group in groups]
        else:
            wanted = _above_threshold(scores, self.options.ratio)
        least = self.options.min_channels
        rounded = [multiple * math.ceil(max(count, least) / multiple) for count in wanted]
        return [min(count, group.size) for count, group in zip(rounded, groups, strict=True)]


def _above_threshold(scores: Sequence[torch.Tensor], ratio: float) -> list[int]:
    """Return per group how many of its scores are among the highest `1 - ratio` of all groups' scores."""
    if not scores:
        return []
    owners = torch.cat([torch.full((len(values),), index) for index, values in enumerate(scores)])
    order = torch.argsort(torch.cat(list(scores)), stable=True)
    removed = owners[order[: math.floor(ratio * len(order))]]
    lost = torch.bincount(removed, minlength=len(scores))
    return [len(values) - int(count) for values, count in zip(scores, lost, strict=True)]


def _highest(values: torch.Tensor, count: int) -> list[int]:
    """Return the sorted indices of the `count` highest scores; of equals the lower index stays."""
    return sorted(torch.argsort(values, descending=True, stable=True)[:count].tolist())


def _left_whole(group: Group, options: PruneOptions, multiple: int) -> Refusal:
    if options.scope == "global":
        return Refusal(group.name, f"all {group.size} score above the global threshold", "above the global threshold")
    if group.size <= options.min_channels:
        return Refusal(group.name, f"{group.size} left, minimum is {options.min_channels}", "already at the minimum")
    return Refusal(
        group.name,
        f"removing {options.ratio:.0%} of {group.size} leaves all of them after rounding to {multiple}",
        "too small after rounding",
    )
