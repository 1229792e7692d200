"""What plans carry and no program reads any more, which is kept for `Result.save` alone: in a file, not in memory.

prune:ratio=0.5,int8        the refitted weights are in the plan of `prune`, the integers made of them in the program
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable

from graphopt.ir.memory import LARGE, mapped
from graphopt.ir.ownership import storage_key, storage_keys
from graphopt.ir.program import Program
from graphopt.pipeline.plan import Plan


def set_aside(plans: Iterable[tuple[str, Plan]], programs: Iterable[Program]) -> tuple[tuple[str, Plan], ...]:
    """Return plans whose large tensors that no program reads are mapped from a temporary file; its name is gone.

    Where there is no room for that file they stay in memory.
    """
    read = frozenset[Hashable]().union(*(storage_keys(program.graph_module) for program in programs))
    return tuple((target, _set_aside(plan, read)) for target, plan in plans)


def lent_by(plans: Iterable[tuple[str, Plan]]) -> frozenset[Hashable]:
    """Return where the tensors of plans lie that programs read as well, and who trains these must not change.

    Those of large plans are not among them: they would take as much memory again.
    """
    small = [plan.tensors.values() for _, plan in plans if sum(one.nbytes for one in plan.tensors.values()) < LARGE]
    return frozenset(storage_key(tensor) for tensors in small for tensor in tensors)


def _set_aside(plan: Plan, read: frozenset[Hashable]) -> Plan:
    alone = {name: tensor for name, tensor in plan.tensors.items() if storage_key(tensor) not in read}
    found = mapped(alone)
    return plan if found is alone else dataclasses.replace(plan, tensors={**plan.tensors, **found})
