"""Recovery between the steps of a pass that takes away more in each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from graphopt.ir.program import Program
from graphopt.pipeline.checkpoints import PartCheckpoints
from graphopt.pipeline.context import Context
from graphopt.pipeline.options import build
from graphopt.pipeline.pass_base import Pass
from graphopt.pipeline.plan import Plan
from graphopt.pipeline.registry import PassRegistry


def recovered(program: Program, epochs: int, ctx: Context, step: int) -> tuple[Program, Plan]:
    """Return a program as the pass `recover` leaves it, and the plan of that.

    Args:
        program: after a step.
        epochs: of training.
        ctx: of the pass that takes the steps.
        step: which it was; what is kept of a killed training is of this one.

    Raises:
        DataError: there is no data, or too little.
    """
    kind = PassRegistry().pass_class("recover")
    recover: Pass[Any, Any] = kind(build("recover", kind.options_type, {"epochs": epochs}))
    plan = recover.plan(program, replace(ctx, checkpoints=PartCheckpoints(ctx.checkpoints, f"step {step}")))
    return recover.apply(program, plan.on(program.device)) if plan.sites else program, plan
