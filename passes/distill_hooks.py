"""Distillation hooks: values inside the program become further outputs, and are taken out again without trace.

    return out      ->      return (out, {"layer1.0:relu#1": relu_2, ...})

The program's own outputs stay first and keep their names; each tap is named `tap_` and its address, here and in
the lowered file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from graphopt.distillation.addresses import Tap, resolve
from graphopt.distillation.cuts import auto_taps
from graphopt.distillation.taps import insert_taps, strip_taps, taps_of
from graphopt.ir.program import Program
from graphopt.pipeline.context import Context
from graphopt.pipeline.pass_base import Pass
from graphopt.pipeline.plan import Plan, Refusal

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class DistillHooksOptions:
    """Which values.

    taps: addresses like `layer1.0.conv2:conv2d`, `layer1.0`, `layer?.?`, `*:gelu`; auto: block boundaries.
    limit: taps that auto places at most, evenly spread.
    strip: remove taps instead: those at the addresses given, all for auto.
    """

    taps: tuple[str, ...] = (AUTO,)
    limit: Annotated[int, Field(ge=1)] = 12
    strip: bool = False


@dataclass(frozen=True, kw_only=True)
class TapPlan(Plan):
    """Sites are addresses; `nodes` holds the node behind each that is inserted, and none when taps are stripped."""

    nodes: Mapping[str, str] = field(default_factory=dict)


class DistillHooks(Pass[DistillHooksOptions, TapPlan]):
    """Add values of the program as outputs, for a distillation loss to read, or strip them.

    Taps are addressed by module path and operator (`layer1.0.conv2:conv2d`), by module path alone for what leaves
    the module (`layer1.0`), by shell globs (`layer?.?`, `*:gelu`), or `auto`: the block boundaries, found as graph
    dominators.

    1. Any tensor of any call can be a tap: one that is an output already, of dynamic size, from inside a
       `torch.no_grad()` region.
    2. Left alone: a value that is a tap already; a size; a tuple of tensors (its elements are values of their own);
       a value whose memory a later in-place call writes to.
    3. `strip` removes taps and gives back the very graph that `taps` was inserted into.
    4. `auto` on a program without any block boundary inserts nothing and says so.

    An address that matches nothing, or without a glob several values, is an error that names the nearest.
    """

    name = "distill_hooks"
    options_type = DistillHooksOptions
    plan_type = TapPlan
    cached = True
    tolerance = 0.0
    changes_outputs = True

    def plan(self, program: Program, ctx: Context) -> TapPlan:
        """Find the values, or the taps to strip."""
        return self._plan_strip(program) if self.options.strip else self._plan_insert(program)

    def apply(self, program: Program, plan: TapPlan) -> Program:
        """Insert or strip the taps of the plan."""
        if plan.nodes:
            return insert_taps(program, [Tap(address, plan.nodes[address]) for address in plan.sites])
        return strip_taps(program, plan.sites)

    def _plan_insert(self, program: Program) -> TapPlan:
        written = [address for address in self.options.taps if address != AUTO]
        taps, refusals = resolve(program, written)
        if AUTO in self.options.taps:
            found = auto_taps(program, self.options.limit)
            taps += [tap for tap in found if tap not in taps]
            if not found:
                refusals.append(Refusal(AUTO, "the program has no block boundary: name the taps by module path"))
        present = set(taps_of(program))
        refusals += [Refusal(tap.address, "it is a tap already") for tap in taps if tap in present]
        nodes = {tap.address: tap.node for tap in taps if tap not in present}
        return self.new_plan(sites=nodes, refusals=refusals, nodes=nodes)

    def _plan_strip(self, program: Program) -> TapPlan:
        present = taps_of(program)
        if AUTO in self.options.taps:
            return self.new_plan(sites=[tap.address for tap in present])
        wanted, refusals = resolve(program, self.options.taps)
        refusals += [Refusal(tap.address, "it is not a tap") for tap in wanted if tap not in present]
        return self.new_plan(sites=[tap.address for tap in wanted if tap in present], refusals=refusals)
