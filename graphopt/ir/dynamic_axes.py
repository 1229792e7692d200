"""Which axes of a model's arguments are dynamic, in the structure `torch.export.export` asks for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.export import Dim

from graphopt.errors import CaptureError
from graphopt.ir.sizes import SizeRange
from graphopt.ir.torch_internals import SMALLEST_TRACED, arguments_by_name, pytree

LeafShapes = list[dict[int, Any]]  # per tensor leaf: {axis: Dim}


def bound_dim(sizes: SizeRange, name: str = "") -> Any:
    """Return an axis of these sizes as `torch.export.export` takes it, under a name if it has one."""
    ends = {end: size for end, size in (("min", sizes.least), ("max", sizes.most)) if size and size >= SMALLEST_TRACED}
    return Dim(name, **ends) if name else Dim.DYNAMIC(**ends)


def arranged(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: LeafShapes) -> Any:
    """Arrange per-leaf dynamic axes like the arguments.

    Raises:
        CaptureError: the arguments hold more or fewer tensors than that.
    """
    named = arguments_by_name(model, args, kwargs)
    found = sum(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(named))
    if found != len(shapes):
        raise CaptureError(
            f"The example inputs hold {found} tensors, and the program takes {len(shapes)}. Give the inputs it was "
            "captured or exported with."
        )
    remaining = iter(shapes)

    def axes(leaf: Any) -> Any:
        return (next(remaining) or None) if isinstance(leaf, torch.Tensor) else None

    return pytree.tree_map(axes, named)
