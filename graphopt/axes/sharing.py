"""Parameters and buffers that are the same memory: one tensor under two names, or read twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.axes.layout import Dims, shape_of
from graphopt.axes.solver import Solver
from graphopt.ir.graph import constant
from graphopt.ir.ownership import memory_key, storage_key


class Sharing:
    """Gives equal memory equal axes, and freezes memory that overlaps in any other way."""

    def __init__(self, gm: fx.GraphModule, solver: Solver) -> None:
        self._gm = gm
        self._solver = solver
        self._known: dict[tuple[Any, ...], Dims] = {}
        self._first: dict[tuple[Any, ...], tuple[tuple[Any, ...], str]] = {}

    def dims(self, node: fx.Node) -> Dims | None:
        """Return the axes of the tensor a get_attr node reads; None if it reads something else."""
        tensor = constant(node, self._gm)
        if tensor is None:
            return None
        key = memory_key(tensor)
        if key not in self._known:
            reason = self._overlap(tensor, key, str(node.target))
            self._known[key] = tuple(self._solver.axis(length, reason) for length in shape_of(tensor))
        return self._known[key]

    def _overlap(self, tensor: torch.Tensor, key: tuple[Any, ...], name: str) -> str | None:
        if len(key) == 1:
            return None
        other_key, other = self._first.setdefault(storage_key(tensor), (key, name))
        if other_key == key:
            return None
        reason = f"`{name}` shares part of its memory with `{other}`"
        for layout in self._known[other_key]:
            self._solver.freeze(layout, reason)
        return reason
