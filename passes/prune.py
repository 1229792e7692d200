"""prune: remove whole channels, hidden units and heads, so that every tensor they touch gets smaller.

    w: (64, 32, 3, 3) -> (48, 32, 3, 3)     v: (128, 64) -> (128, 48)     norm: (64,) -> (48,)

Which dimensions go together is inferred (`graphopt.axes`): an axis that some weight produces and some weight
consumes is a group, and an index leaves every parameter, buffer and literal that carries the group's axis at once.
Groups are ranked by a criterion (`graphopt.passes.pruning.criteria`); how many each keeps follows from a ratio or from
a target on parameters, FLOPs, bytes or measured latency. With calibration data the layers behind are refitted to give
what they gave before (`graphopt.passes.pruning.compensation`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from graphopt.axes.infer import infer
from graphopt.axes.proof.masked import check_masked_equivalence, check_slices
from graphopt.axes.rewrite import remove, slices
from graphopt.errors import PassError, VerifyError
from graphopt.ir.plain_data import Json
from graphopt.ir.program import Program
from graphopt.loading.functions import resolve_function
from graphopt.passes.pruning.choice import choose
from graphopt.passes.pruning.options import PruneOptions
from graphopt.passes.pruning.reconstruction import with_tensors
from graphopt.passes.pruning.rounds import decide
from graphopt.pipeline.context import Context
from graphopt.pipeline.pass_base import Pass
from graphopt.pipeline.plan import Plan

__all__ = ["Prune", "PruneOptions", "PruningPlan"]


@dataclass(frozen=True, kw_only=True)
class PruningPlan(Plan):
    """Which indices stay. Tensors: refitted weights, biases and statistics by name, in their new shapes.

    Attributes:
        kept: {parameter or buffer: {dimension: sorted kept indices of the original}}, for what shrinks.
        groups: {group: sorted kept indices of its axis}; what `apply` reads.
        compensated: {weight: {"before": relative squared error of its output on every eighth sample, "after": the
            same with a weight fitted to the others, "ridge": strength of the pull to the old one}}; the weight that
            is stored is fitted to all of them by that ridge.
    """

    kept: Mapping[str, Mapping[int, Sequence[int]]] = field(default_factory=dict)
    groups: Mapping[str, Sequence[int]] = field(default_factory=dict)
    compensated: Mapping[str, Mapping[str, Json]] = field(default_factory=dict)


class Prune(Pass[PruneOptions, PruningPlan]):
    """Remove the least important channels, hidden units and heads of every group.

    1. An axis that a weight produces and a weight consumes loses its lowest-scored indices, in every tensor.
    2. Refused: an axis that must stay whole (it reaches an input or output, an operator without a rule, a
       reshape without common factors, nothing consumes it); the reason names what holds it.
    3. Refused: a group so small, or a ratio so low, that rounding leaves it whole, and one that the criterion has
       nothing to rank by.
    4. Refused: a group named in `skip`, or of a kind that is not in `kinds`.
    5. Refused: with guard=measure, a group whose removal does not make the runtime faster.
    6. With data, every layer whose input changed is refitted by least squares; refused: one whose weight is shared or
       computed, one whose samples cannot be told apart, and one that is no better for it on samples it was not fitted
       to.
    """

    name = "prune"
    options_type = PruneOptions
    plan_type = PruningPlan
    cached = True

    def __init__(self, options: PruneOptions | None = None) -> None:
        """Take options; those that are measured in a runtime make the plan depend on the target."""
        super().__init__(options)
        self.reads_target = self.options.measures

    def plan(self, program: Program, ctx: Context) -> PruningPlan:
        """Choose the indices that stay and the tensors they should have.

        Raises:
            UsageError: a glob matches no group, two give one group different ratios, or `loss` cannot be imported.
            PassError: a target cannot be met.
            DataError: the criterion needs data and there is none.
        """
        if self.options.loss is not None:
            ctx = replace(ctx, loss=resolve_function(self.options.loss, "Option `loss` of pass `prune`:"))
        axes = infer(program.graph_module)
        choice = choose(axes, self.options)
        found = decide(program, axes, choice, self.options, ctx)
        groups = {group.name: found.kept[group.axis] for group in choice.groups if group.axis in found.kept}
        return self.new_plan(
            sites=groups,
            refusals=[*choice.refusals, *found.refusals, *found.fitted.refusals],
            groups=groups,
            kept=slices(axes, found.kept),
            tensors=found.fitted.tensors,
            compensated=found.fitted.layers,
            measured=found.measured,
            notes=tuple(found.notes),
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
        pruned = program.with_graph(remove(program.graph_module, axes, kept, self.name, instead=plan.tensors))
        return with_tensors(pruned, plan.tensors, self.name) if plan.tensors else pruned

    def prove(self, before: Program, after: Program, plan: PruningPlan) -> None:
        """Prove masked equivalence in float64 with all parameters drawn at random, and that tensors are the plan's.

        Masked equivalence is about the removal alone, whatever values are stored. Those are compared bit for bit: what
        was refitted with the plan, all else with what is kept of the original.
        """
        axes = infer(before.graph_module)
        axis_of = {group.name: group.axis for group in axes.groups()}
        kept = {axis_of[name]: list(indices) for name, indices in plan.groups.items()}
        cut = before.with_graph(remove(before.graph_module, axes, kept, self.name)).state_dict()
        stored = after.state_dict()
        for name, tensor in plan.tensors.items():
            if not torch.equal(stored[name], tensor.to(stored[name].device)):
                raise VerifyError(f"`{name}` does not hold what the plan of `prune` says. Apply the plan again.")
        restored = with_tensors(after, {name: cut[name] for name in plan.tensors}, self.name)
        check_slices(before.graph_module, restored.graph_module, plan.kept)
        check_masked_equivalence(
            before.graph_module, after.graph_module, plan.kept, before.example_args, before.example_kwargs
        )
