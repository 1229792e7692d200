"""Passes for testing the framework itself: honest ones, and ones that break a contract each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from graphopt.ir.editor import Editor
from graphopt.ir.graph import tensor_attribute
from graphopt.ir.program import Program
from graphopt.pipeline.context import Context
from graphopt.pipeline.pass_base import NoOptions, Pass
from graphopt.pipeline.plan import Plan, Refusal


@dataclass(frozen=True, slots=True)
class ScaleOptions:
    """Options of every kind that pipelines can write."""

    factor: Annotated[float, Field(gt=0, le=2)] = 1.0
    times: Annotated[int, Field(ge=1)] = 1
    mode: Literal["all", "first"] = "all"
    skip: tuple[str, ...] = ()
    limit: int | None = None
    dry: bool = False


class Scale(Pass[ScaleOptions, Plan]):
    """Multiply every matrix of weights by `factor`.

    1. A matrix is scaled.
    2. A weight named in `skip` is refused.
    """

    name = "scale"
    options_type = ScaleOptions

    def plan(self, program: Program, ctx: Context) -> Plan:
        """Scale all matrices but those to skip."""
        names = [name for name, p in program.graph_module.named_parameters() if p.dim() > 1]
        refused = [Refusal(name, f"`{name}` is in skip", "in skip") for name in names if name in self.options.skip]
        return self.new_plan(sites=[n for n in names if n not in self.options.skip], refusals=refused)

    def apply(self, program: Program, plan: Plan) -> Program:
        """Multiply."""
        program = program.copy()
        editor = Editor(program.graph_module, self.name)
        for name in plan.sites:
            editor.put(name, tensor_attribute(program.graph_module, name) * self.options.factor, trainable=True)
        return program.with_graph(editor.finish())


class Random(Pass[NoOptions, Plan]):
    """Replace every matrix by random numbers that the plan stores."""

    name = "random"

    def plan(self, program: Program, ctx: Context) -> Plan:
        """Draw the numbers."""
        generator = ctx.generator(self.name)
        drawn = {
            name: torch.randn(p.shape, generator=generator)
            for name, p in program.graph_module.named_parameters()
            if p.dim() > 1
        }
        return self.new_plan(sites=drawn, tensors=drawn)

    def apply(self, program: Program, plan: Plan) -> Program:
        """Put them in place."""
        program = program.copy()
        editor = Editor(program.graph_module, self.name)
        for name in plan.sites:
            editor.put(name, plan.tensors[name], trainable=True)
        return program.with_graph(editor.finish())


class Prepare(Scale):
    """Make a program `ready`."""

    name = "prepare"
    produces = ("ready",)


class NeedsReady(Scale):
    """Need a `ready` program and read the target."""

    name = "needs_ready"
    needs = ("ready",)
    after = ("scale",)
    conflicts = ("random",)
    reads_target = True

    def plan(self, program: Program, ctx: Context) -> Plan:
        """Record which target it planned for."""
        return self.new_plan(sites=[], measured={"target": ctx.need_target(self.name).name})


class ExactLie(Scale):
    """Claim to be exact."""

    name = "exact_lie"
    tolerance = 1e-6


class SameObject(Scale):
    """Return the program it was given."""

    name = "same_object"

    def apply(self, program: Program, plan: Plan) -> Program:
        """Change nothing."""
        return program
