"""Where the axes of a permuted value were before."""

from __future__ import annotations

import torch
from torch import fx


def axes_before(node: fx.Node, source: fx.Node) -> list[int]:
    """Return, for every axis of what a reordering (`permute`, `transpose`, `t`, ...) returns, the one it was."""
    sizes = range(2, source.meta["val"].dim() + 2)  # one of its own for each axis tells them apart
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda read: torch.empty(*sizes, device="meta"))
    reordered = node.target(*args, **kwargs)  # type: ignore[operator]
    return [size - 2 for size in reordered.shape]
