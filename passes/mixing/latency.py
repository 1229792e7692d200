"""What each site saves of the time by its form, measured in the runtime: what all save, less what all but it do.

Alone in a float network an integer layer pays for quantizing on both sides, so each is looked at among the others.
Sites whose calls have the same operators and shapes run the same kernels and are timed together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from graphopt.ir.program import Program
from graphopt.measure.budget import Timer
from graphopt.passes.mixing.forms import FLOAT, Form, FormSite, compose
from graphopt.pipeline.context import Context


def time_saved(
    program: Program, ctx: Context, sites: Sequence[FormSite], form: Form, timer: Timer, *, fill_up: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Return by site what a form saves, as a share of the time of the original, and what was measured, for the plan.

    Args:
        program: what the sites are of.
        ctx: what plans are made with.
        sites: all of them.
        form: of those that may have it.
        timer: measures in the target's runtime.
        fill_up: as `compose` takes it.
    """
    there = [site for site in sites if form in site.noise]
    floats = {site.name: FLOAT for site in sites}
    all_of_it = {**floats, **{site.name: form for site in there}}
    _, whole = compose(program, ctx, sites, all_of_it, fill_up=fill_up)
    left = timer(whole, ctx.original).median
    measured = {f"{form}: all": left}
    saved: dict[str, float] = {}
    classes = list(_classes(there).values())
    for members in ctx.progress.track(classes, f"timing {form}", len(classes)):
        others = {**all_of_it, **{site.name: FLOAT for site in members}}
        _, without = compose(program, ctx, sites, others, fill_up=fill_up)
        ratio = timer(without, whole).median
        measured[f"{form}: all but {members[0].name}"] = ratio
        saved |= dict.fromkeys((site.name for site in members), (ratio - 1) * left / len(members))
        ctx.forget(without)
    return saved, measured


def _classes(sites: Sequence[FormSite]) -> dict[object, list[FormSite]]:
    found: dict[object, list[FormSite]] = {}
    for site in sites:
        calls = {call: None for knob in site.knobs.values() for call in knob.alternatives}
        found.setdefault(tuple(sorted(map(_shapes, calls))), []).append(site)
    return found


def _shapes(call: fx.Node) -> str:
    values = [node.meta.get("val") for node in (*call.all_input_nodes, call)]
    shapes = [tuple(value.shape) if isinstance(value, torch.Tensor) else None for value in values]
    options = [argument for argument in call.args if not isinstance(argument, fx.Node)]
    return f"{call.target} {shapes} {options}"
