"""Which axes of a model's arguments are dynamic, in the structure `torch.export.export` asks for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from graphopt.ir.torch_internals import arguments_by_name, pytree

LeafShapes = list[dict[int, Any]]  # per tensor leaf: {axis: Dim}


def arranged(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: LeafShapes) -> Any:
    """Arrange per-leaf dynamic axes like the arguments."""
    remaining = iter(shapes)

    def axes(leaf: Any) -> Any:
        return (next(remaining) or None) if isinstance(leaf, torch.Tensor) else None

    return pytree.tree_map(axes, arguments_by_name(model, args, kwargs))
