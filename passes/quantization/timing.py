"""The guard that reads a clock: of the ways to place integers the one that is fastest here, none where float is.

What it sees is recorded in the plan, which replays without it.
"""

from __future__ import annotations

from collections.abc import Callable

from graphopt.ir.program import Program
from graphopt.measure.budget import Guard
from graphopt.passes.quantization.placing import Placer
from graphopt.passes.quantization.plan import Int8Plan
from graphopt.pipeline.plan import Refusal

_KIND = "integers are no faster in all"


def fastest(
    ways: list[tuple[str, Placer]],
    planned: Callable[[Placer], Int8Plan],
    apply: Callable[[Int8Plan], Program],
    program: Program,
    guard: Guard,
) -> Int8Plan:
    """Plan in every way, time each against float, and return the plan of the fastest.

    Args:
        ways: what places integers, by name; where the first takes all that can be, they go back to float together.
        planned: makes a plan of it.
        apply: carries it out on the program.
        program: what they are timed against.
        guard: times.
    """
    plans: dict[str, Int8Plan] = {}
    objections = {}
    for name, placer in ways:
        plan = planned(placer)
        if plan.sites and all(plan.sites != other.sites for other in plans.values()):
            plans[name] = plan
            objections[name] = guard.objects(name, apply(plan), program)
    if not plans:
        return plan
    best = min(plans, key=lambda name: guard.measured[name][1])
    if not objections[best]:
        return plans[best]
    placer = ways[0][1]
    prepared, placement = placer.run(program)
    reason = f"integers take {objections[best]} of the time of float here"
    units = dict.fromkeys(prepared.unit(site.node) for site in placement.sites)
    return planned(placer.without({unit: Refusal(unit, reason, _KIND) for unit in units}))
