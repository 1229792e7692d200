"""What plans carry and no program reads any more, which is kept for `Result.save` alone: in a file, not in memory.

prune:ratio=0.5,int8        the refitted weights are in the plan of `prune`, the integers made of them in the program
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from graphopt.errors import UsageError
from graphopt.files import ScratchDirectory
from graphopt.ir.memory import LARGE
from graphopt.ir.ownership import place, storages
from graphopt.ir.program import Program
from graphopt.pipeline.plan import Plan

_KINDS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8)


def set_aside(plans: Iterable[tuple[str, Plan]], programs: Iterable[Program]) -> tuple[tuple[str, Plan], ...]:
    """Return plans whose large tensors that no program reads are mapped from a temporary file; its name is gone.

    Where there is no room for that file they stay in memory.
    """
    read = frozenset[int]().union(*(storages(program.graph_module) for program in programs))
    return tuple((target, _set_aside(plan, read)) for target, plan in plans)


def _set_aside(plan: Plan, read: frozenset[int]) -> Plan:
    alone = {
        name: tensor
        for name, tensor in plan.tensors.items()
        if place(tensor) not in read and tensor.dtype in _KINDS and tensor.device.type == "cpu" and tensor.numel()
    }
    if sum(tensor.nbytes for tensor in alone.values()) < LARGE:
        return plan
    with contextlib.suppress(SafetensorError, RuntimeError, UsageError), ScratchDirectory() as folder:
        path = Path(folder) / "payload.safetensors"
        save_file({name: tensor.detach().contiguous() for name, tensor in alone.items()}, path)
        mapped = load_file(path)
        return dataclasses.replace(plan, tensors={name: mapped.get(name, t) for name, t in plan.tensors.items()})
    return plan
