"""Which axes of a model's arguments are dynamic, in the structure `torch.export.export` asks for.

The one place that uses torch's private way of naming arguments (checked on torch 2.13;
`tests/graphopt/test_capturing.py` fails when it moves).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.export.dynamic_shapes import _combine_args
from torch.utils import _pytree as pytree

LeafShapes = list[dict[int, Any]]  # per tensor leaf: {axis: Dim}


def by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return positional and keyword arguments under the names `model.forward` gives them."""
    combined: dict[str, Any] = _combine_args(model, args, kwargs)
    return combined


def arranged(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: LeafShapes) -> Any:
    """Arrange per-leaf dynamic axes like the arguments."""
    remaining = iter(shapes)

    def axes(leaf: Any) -> Any:
        return (next(remaining) or None) if isinstance(leaf, torch.Tensor) else None

    return pytree.tree_map(axes, by_name(model, args, kwargs))
