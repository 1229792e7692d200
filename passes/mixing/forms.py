"""Forms that a weight may have, each made by a pass: which sites it has, and a program made of several of them.

int8         integers, multiplied as such where the target has kernels
weights8..2  stored in so many bits, multiplied in float
codebook4..2 numbers of entries of a table, for the size of the file alone; convolutions too
half         16 bits: computed in, or stored, as the target can
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import networkx as nx
from torch import fx

from graphopt.errors import PassError
from graphopt.ir.program import Program
from graphopt.ir.provenance import module_path, origin
from graphopt.pipeline.context import Context
from graphopt.pipeline.globs import check_globs, is_named
from graphopt.pipeline.knobs import Knob
from graphopt.pipeline.options import build
from graphopt.pipeline.pass_base import Pass
from graphopt.pipeline.plan import Plan
from graphopt.pipeline.registry import PassRegistry

Form = Literal["weights2", "weights3", "weights4", "weights8", "codebook2", "codebook3", "codebook4", "int8", "half"]
FLOAT = "float32"

# the pass that makes each, and its options, in the order in which passes run
_MADE_BY: Mapping[Form, tuple[str, Mapping[str, Any]]] = {
    "weights2": ("weights", {"bits": 2}),
    "weights3": ("weights", {"bits": 3}),
    "weights4": ("weights", {"bits": 4}),
    "weights8": ("weights", {"bits": 8}),
    "codebook2": ("codebook", {"bits": 2}),
    "codebook3": ("codebook", {"bits": 3}),
    "codebook4": ("codebook", {"bits": 4}),
    "int8": ("int8", {"guard": "none"}),  # what pays is decided here, and by bytes perhaps
    "half": ("half", {}),
}


@dataclass(eq=False)
class FormSite:
    """One weight, or call, and what the forms that it may have would do to it.

    Attributes:
        name: of it.
        knobs: by form.
        skipped: the glob by which it stays as it is, "" for none.
        noise: by form that it may have, the share of the outputs' power that it alone changes; of float32 none.
    """

    name: str
    knobs: dict[Form, Knob]
    skipped: str = ""
    noise: dict[str, float] = dataclasses.field(default_factory=lambda: {FLOAT: 0.0})

    def saves(self, form: str, unit: str) -> float:
        """Return what a form saves."""
        return 0.0 if form == FLOAT else self.knobs[form].saves.get(unit, 0.0)  # type: ignore[index]


def make_pass(name: str, options: Mapping[str, Any]) -> Pass[Any, Any]:
    """Return a pass by its name."""
    kind = PassRegistry().pass_class(name)
    return kind(build(name, kind.options_type, options))


def stored_pass(step: Mapping[str, Any]) -> Pass[Any, Any]:
    """Return the pass of a stored plan, which may come out of a file.

    Raises:
        PassError: it makes no form.
    """
    name = step.get("pass_name")
    if name not in {made_by for made_by, _ in _MADE_BY.values()} or not isinstance(step.get("options"), Mapping):
        raise PassError("The stored plan of `mixed` holds one of no pass that makes a form. Make the plan again.")
    return make_pass(str(name), step["options"])


def find_sites(program: Program, ctx: Context, forms: Sequence[Form], skip: Sequence[str]) -> list[FormSite]:
    """List what passes could bring into one of some forms, in graph order; what shares a call is one site.

    Raises:
        UsageError: a glob of `skip` names nothing.
    """
    found = {form: make_pass(*_MADE_BY[form]).knobs(program, ctx) for form in forms}
    touching: nx.Graph[fx.Node] = nx.Graph()
    for knobs in found.values():
        for knob in knobs:
            nx.add_star(touching, knob.alternatives)
    sites = []
    for calls in nx.connected_components(touching):
        here = {
            form: [knob for knob in knobs if not calls.isdisjoint(knob.alternatives)] for form, knobs in found.items()
        }
        joined = {form: Knob.of_all(knobs) for form, knobs in here.items() if knobs}
        sites.append(FormSite(next(iter(joined.values())).site, joined))
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    sites.sort(key=lambda site: min(order[call] for knob in site.knobs.values() for call in knob.alternatives))
    named = {site: _names(site) for site in sites}
    check_globs("skip", skip, [name for names in named.values() for name in names], kind="weight or layer")
    for site, names in named.items():
        site.skipped = next((glob for glob in skip if any(is_named(name, glob) for name in names)), "")
    return sites


def compose(
    program: Program, ctx: Context, sites: Sequence[FormSite], chosen: Mapping[str, str], *, fill_up: bool = False
) -> tuple[list[Plan], Program]:
    """Let passes bring each site into the form that is chosen for it.

    Args:
        program: what the sites are of.
        ctx: what plans are made with.
        sites: all of them.
        chosen: by name of the site its form.
        fill_up: whether depthwise layers may get more channels, faster and larger.

    Returns:
        Their plans, in order, and the program.
    """
    plans: list[Plan] = []
    for form, (name, options) in _MADE_BY.items():
        if not any(chosen[site.name] == form for site in sites):
            continue
        there = {node.name for node in program.graph.nodes} | set(map(module_path, program.graph.nodes))
        others = [site.knobs[form].skip for site in sites if form in site.knobs and chosen[site.name] != form]
        skip = [name for names in others for name in names if name in there]  # not what a pass before has rewritten
        filled = {"fill_up": fill_up} if form == "int8" else {}
        made = make_pass(name, {**options, **filled, "skip": tuple(dict.fromkeys(skip))})
        plan = _without_own(made.plan(program, ctx), program, {before.pass_name for before in plans})
        plans.append(plan)
        if plan.sites:
            before, program = program, made.apply(program, plan.on(program.device))
            if len(plans) > 1:
                ctx.forget(before)
    return plans, program


def _without_own(plan: Plan, program: Program, passes: Collection[str]) -> Plan:
    """Return a plan that refuses nothing that passes before have made: no model has that."""
    origins = {node.name: origin(node) for node in program.graph.nodes}
    own = {name for name, known in origins.items() if known is not None and known.made_by in passes}
    return dataclasses.replace(plan, refusals=tuple(one for one in plan.refusals if one.site not in own))


def _names(site: FormSite) -> list[str]:
    calls = dict.fromkeys(call for knob in site.knobs.values() for call in knob.alternatives)
    return [site.name, *(name for call in calls for name in (module_path(call), call.name) if name)]
