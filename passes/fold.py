"""Fold what is fixed once the model is trained: no-ops, constants, and BatchNorm into the layer beside it.

    conv2d -> dropout -> batch_norm -> relu        conv2d -> relu

Three stages, each a module of its own: `no_ops`, `constant_folding`, `affine_folding`; repeated while they find
something.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from graphopt.ir.program import Program
from graphopt.passes.folding.affine_folding import AffineFold, apply_affine_folds, find_affine_folds
from graphopt.passes.folding.constant_folding import ConstantFold, find_constants, store_constants
from graphopt.passes.folding.no_ops import drop_no_ops, find_no_ops
from graphopt.pipeline.context import Context
from graphopt.pipeline.pass_base import NoOptions, Pass
from graphopt.pipeline.plan import Plan, Refusal

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FoldRound:
    """What is done at once; the next round works on the result.

    Attributes:
        dropped: names of the calls that return their input.
        constants: values that are stored instead of computed.
        affines: scales and shifts that go into a layer.
    """

    dropped: tuple[str, ...] = ()
    constants: tuple[ConstantFold, ...] = ()
    affines: tuple[AffineFold, ...] = ()

    @property
    def sites(self) -> list[str]:
        """The nodes that go."""
        folded = [name for fold in self.affines for name in fold.affines]
        return [*self.dropped, *(fold.node for fold in self.constants), *folded]


@dataclass(frozen=True, kw_only=True)
class FoldPlan(Plan):
    """What `fold` does. The tensors are the constants, by the name they are stored under.

    Attributes:
        rounds: each works on the result of the one before: conv -> batch_norm -> mul is two.
    """

    rounds: tuple[FoldRound, ...] = ()


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
    cached = True
    # A fold rounds each weight once and drops the roundings of the call that goes: about 4 units of 2^-24 on the scale
    # of an output. Errors of 200 layers in a row that add up linearly are 200 * 4 * 2^-24 = 5e-5.
    tolerance = 1e-4
    produces = ("folded",)

    def plan(self, program: Program, ctx: Context) -> FoldPlan:
        """Find what can be folded, round after round, each on the result of the one before."""
        rounds: list[FoldRound] = []
        tensors: dict[str, torch.Tensor] = {}
        while True:
            found, refusals, program = _find_round(program, tensors)
            if not found.sites:
                break
            rounds.append(found)
        plan = self.new_plan(
            sites=[site for found in rounds for site in found.sites],
            refusals=refusals,
            tensors=tensors,
            rounds=tuple(rounds),
        )
        logger.info("fold: %s", plan.summary())
        return plan

    def apply(self, program: Program, plan: FoldPlan) -> Program:
        """Carry out the rounds in order."""
        result = program
        for found in plan.rounds:
            result = _apply_affines(_apply_constants(_drop(result, found), found, plan.tensors), found)
        return program.copy() if result is program else result


def _find_round(program: Program, tensors: dict[str, torch.Tensor]) -> tuple[FoldRound, list[Refusal], Program]:
    """Return one round, what it leaves alone, and the program after it; add its constants to `tensors`."""
    dropped, refusals = find_no_ops(program)
    found = FoldRound(dropped=tuple(dropped))
    program = _drop(program, found)
    constants, stored, too_large = find_constants(program, taken=tensors)
    tensors.update(stored)
    found = replace(found, constants=tuple(constants))
    program = _apply_constants(program, found, tensors)
    affines, left = find_affine_folds(program)
    found = replace(found, affines=tuple(affines))
    program = _apply_affines(program, found)
    present = {node.name for node in program.graph.nodes}  # what one stage leaves, a later one may remove
    return found, [refusal for refusal in (*refusals, *too_large, *left) if refusal.site in present], program


def _drop(program: Program, found: FoldRound) -> Program:
    return drop_no_ops(program, found.dropped) if found.dropped else program


def _apply_constants(program: Program, found: FoldRound, tensors: Mapping[str, torch.Tensor]) -> Program:
    return store_constants(program, found.constants, tensors) if found.constants else program


def _apply_affines(program: Program, found: FoldRound) -> Program:
    return apply_affine_folds(program, found.affines) if found.affines else program
