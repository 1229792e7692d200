"""Running a pipeline over a program: plan, apply, check, and fork where targets differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from graphopt.errors import VerifyError
from graphopt.ir.invariants import check_invariants
from graphopt.ir.memory import give_back
from graphopt.ir.program import Program
from graphopt.measure.equivalence import measure
from graphopt.pipeline.context import Context
from graphopt.pipeline.contract import called, checked_plan, checked_program
from graphopt.pipeline.hooks import Hook
from graphopt.pipeline.order import Step
from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.plan import Plan, Refusal
from graphopt.quantization.stored import is_quantized
from graphopt.targets.description import TargetDescription

_NOTHING_FOUND = Refusal("the program", "there is nothing in it that the pass rewrites")


@dataclass(frozen=True)
class Rewritten:
    """What a pipeline made of a program.

    Attributes:
        programs: the final program of each target, keyed by target name; one entry "" when there is no target.
        plans: (target, plan) in the order they were made; target "" before the fork.
    """

    programs: dict[str, Program]
    plans: tuple[tuple[str, Plan], ...]


class PlanCache(Protocol):
    """Plans of steps that were made before, by the content of all that they were made of."""

    def find(self, step: Step, program: Program, ctx: Context) -> Plan | None:
        """Return the plan that this step made of the same before, None if there is none."""

    def keep(self, plan: Plan) -> None:
        """Keep the plan of the step that was last looked for, which has been carried out and checked."""

    def follows(self, before: Program, after: Program, plan: Plan) -> None:
        """Note what a plan made of a program."""


def run(
    pipeline: Pipeline, program: Program, ctx: Context, hooks: Sequence[Hook] = (), cache: PlanCache | None = None
) -> Rewritten:
    """Run every step. Steps up to the first that reads a target description run once for all targets.

    Raises:
        PassError: a pass could not plan or apply.
        VerifyError: a result breaks an invariant, or an exact pass is further off than it declares.
    """
    fork = pipeline.fork() if ctx.targets else len(pipeline.steps)
    shared, own = pipeline.steps[:fork], pipeline.steps[fork:]
    ctx = dataclasses.replace(ctx)  # which is told what happens in this run
    asked = any(step.instance.reads_floating for step in pipeline.steps)
    forked, plans = _run_branch(shared, program, ctx, hooks, cache, asked)
    if not ctx.targets:
        return Rewritten({"": forked}, tuple(plans))
    programs = {}
    for target in ctx.targets:
        programs[target.name], made = _run_branch(own, forked, _for_target(ctx, target), hooks, cache, asked)
        plans += made
    return Rewritten(programs, tuple(plans))


def _run_branch(
    steps: Sequence[Step],
    first: Program,
    ctx: Context,
    hooks: Sequence[Hook],
    cache: PlanCache | None,
    keeps_floating: bool,
) -> tuple[Program, list[tuple[str, Plan]]]:
    program, plans = first, []
    for step in steps:
        before = program
        if keeps_floating and not is_quantized(before):
            ctx.floating = before
        program, plan = run_step(step, before, ctx, hooks, cache)
        plans.append((ctx.target.name if ctx.target else "", plan))
        if program is not before and before is not first:  # which other branches read too
            ctx.forget(before)
        give_back(ctx.original.parameters())
    return program, plans


def run_step(
    step: Step, program: Program, ctx: Context, hooks: Sequence[Hook] = (), cache: PlanCache | None = None
) -> tuple[Program, Plan]:
    """Plan and apply one step, check the result, and tell the hooks; a plan that is kept was checked before."""
    target = ctx.target.name if ctx.target else ""
    for hook in hooks:
        hook.before(step, program, target)
    kept = cache.find(step, program, ctx) if cache is not None else None
    plan = kept or _planned(step, program, ctx)
    for hook in hooks:
        hook.planned(step, plan, target)
    result = apply(step.instance, program, plan, checked=kept is not None)
    if cache is not None:
        if kept is None:
            cache.keep(plan)
        cache.follows(program, result, plan)
    for hook in hooks:
        hook.after(step, program, result, plan, target)
    return result, plan


def _planned(step: Step, program: Program, ctx: Context) -> Plan:
    with called(step.instance, "plan"):
        plan = checked_plan(step.instance, step.instance.plan(program, ctx)).on(torch.device("cpu"))
    if not plan.sites and not plan.refusals and not step.inserted_for:
        return dataclasses.replace(plan, refusals=(_NOTHING_FOUND,))
    return plan


def apply(
    instance: Any,
    program: Program,
    plan: Plan,
    *,
    stored: Callable[[Program], Program] | None = None,
    checked: bool = False,
) -> Program:
    """Carry out a plan and check what every pass must keep. A plan without sites returns `program` itself.

    Args:
        instance: the pass.
        program: what the plan was made for.
        plan: what the pass decided.
        stored: where the plan comes from a file, see `called`: what makes a program safe that is made of it.
        checked: whether what it makes of this very program was checked before.
    """
    if not plan.sites:
        return program
    with called(instance, "apply its plan", stored=stored is not None):
        result = checked_program(instance, instance.apply(program, plan.on(program.device)))
    if result.graph_module is program.graph_module:
        raise VerifyError(f"Pass `{instance.name}` returned the program it was given. Work on `program.copy()`.")
    if checked:
        return result
    exact = instance.tolerance is not None
    with called(instance, "make a program that runs", stored=stored is not None):
        if stored is not None:
            result = stored(result)
        check_invariants(program, result, instance.name, changes_outputs=instance.changes_outputs, exact=exact)
        if exact:
            _check_exact(instance, program, result)
    return result


def _check_exact(instance: Any, before: Program, after: Program) -> None:
    found = measure(before, after.call_flat, before.flat_examples(), declared=after.outputs, settled=True)
    tolerance = instance.tolerance * _coarseness(before)
    if found.relative > tolerance:
        raise VerifyError(
            f"Pass `{instance.name}` is exact to {tolerance:g}, but changed the outputs by "
            f"{found.relative:.3g} of their largest value. Leave the pass out and report the model."
        )


def _coarseness(program: Program) -> float:
    """Return how much coarser than float32 the program's coarsest floating type is; tolerances are for float32."""
    floats = [tensor.dtype for tensor in program.state_dict().values() if tensor.is_floating_point()]
    floats += [spec.dtype for spec in program.outputs if spec.dtype.is_floating_point]
    coarsest = max((torch.finfo(dtype).eps for dtype in floats), default=0.0)
    return max(1.0, coarsest / torch.finfo(torch.float32).eps)


def _for_target(ctx: Context, target: TargetDescription) -> Context:
    return dataclasses.replace(ctx, target=target)
