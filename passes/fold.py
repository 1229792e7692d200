"""Fold what is fixed once the model is trained: no-ops, constants, and BatchNorm into the layer beside it.

    conv2d -> dropout -> batch_norm -> relu        conv2d -> relu

Three stages, each a module of its own: `no_ops`, `constant_folding`, `affine_folding` (repeated while it finds
something: conv -> batch_norm -> mul is two rounds).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graphopt.context import Context
from graphopt.pass_base import NoOptions, Pass
from graphopt.passes.affine_folding import AffineFold, apply_affine_folds, find_affine_folds
from graphopt.passes.constant_folding import ConstantFold, find_constants, store_constants
from graphopt.passes.no_ops import drop_no_ops, find_no_ops
from graphopt.plan import Plan
from graphopt.program import Program

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FoldPlan(Plan):
    """What `fold` does, stage by stage. The tensors are the constants, by the name they are stored under.

    Attributes:
        dropped: names of the calls that return their input.
        constants: values that are stored instead of computed.
        rounds: scales and shifts that go into a layer; each round works on the result of the one before.
    """

    dropped: tuple[str, ...] = ()
    constants: tuple[ConstantFold, ...] = ()
    rounds: tuple[tuple[AffineFold, ...], ...] = ()

    def __post_init__(self) -> None:
        """Turn stored JSON back into records."""
        object.__setattr__(self, "dropped", tuple(self.dropped))
        object.__setattr__(self, "constants", tuple(_record(ConstantFold, item) for item in self.constants))
        rounds = tuple(tuple(_record(AffineFold, item) for item in folds) for folds in self.rounds)
        object.__setattr__(self, "rounds", rounds)


class Fold(Pass[NoOptions, FoldPlan]):
    """Remove calls that cost time and change nothing once the weights are fixed. Exact.

    1. Calls that return their input: Dropout in eval, identities, `contiguous`, views to the same shape, `x * 1`.
    2. Values that depend on no input, computed once: masks, position tables, weight normalisation.
    3. BatchNorm, and other scales and shifts by stored numbers, into the convolution (1d, 2d, 3d, grouped, transposed)
       or linear layer before it, also through views and permutations; failing that, into the one after it, where no
       zero padding lies between. A bias is created where the layer has none.

    Left alone, with the reason: a BatchNorm whose layer's output has another reader, or that follows no layer (it stays
    a BatchNorm); one in training mode; a weight shared with calls that do not take in the same BatchNorm, unless an own
    copy is small; constants that would take many times the bytes they are computed from; everything random.

    A folded program can be trained, but without BatchNorm statistics and Dropout: train (`recover`) before folding.
    """

    name = "fold"
    plan_type = FoldPlan
    # A fold rounds each weight once and drops the roundings of the call that goes: about 4 units of 2^-24 on the scale
    # of an output. Errors of 200 layers in a row that add up linearly are 200 * 4 * 2^-24 = 5e-5.
    tolerance = 1e-4
    produces = ("folded",)

    def plan(self, program: Program, ctx: Context) -> FoldPlan:
        """Find what can be folded, stage after stage, each on the result of the one before."""
        dropped, refusals = find_no_ops(program)
        program = drop_no_ops(program, dropped)
        constants, tensors, too_large = find_constants(program)
        program = store_constants(program, constants, tensors)
        rounds: list[tuple[AffineFold, ...]] = []
        while True:
            folds, left = find_affine_folds(program)
            if not folds:
                break
            rounds.append(tuple(folds))
            program = apply_affine_folds(program, folds)
        affines = [name for folds in rounds for fold in folds for name in fold.affines]
        present = {node.name for node in program.graph.nodes}  # what one stage leaves, a later one may remove
        plan = self.new_plan(
            sites=[*dropped, *(fold.node for fold in constants), *affines],
            refusals=[refusal for refusal in (*refusals, *too_large, *left) if refusal.site in present],
            tensors=tensors,
            dropped=tuple(dropped),
            constants=tuple(constants),
            rounds=tuple(rounds),
        )
        logger.info("fold: %s", plan.summary())
        return plan

    def apply(self, program: Program, plan: FoldPlan) -> Program:
        """Carry out the stages in order."""
        program = drop_no_ops(program, plan.dropped)
        program = store_constants(program, plan.constants, plan.tensors)
        for folds in plan.rounds:
            program = apply_affine_folds(program, folds)
        return program


def _record(kind: type[Any], item: Any) -> Any:
    """Return `item` as a `kind`, lists as tuples."""
    if not isinstance(item, Mapping):
        return item
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in item.items()})
