"""Whether a reader can tell two values apart by anything but their elements."""

from __future__ import annotations

import torch
from torch import fx


def indistinguishable(one: fx.Node, other: fx.Node) -> bool:
    """Whether shape, dtype, strides and device are equal; dynamic sizes are compared as expressions, without a guard.

    Where this holds, readers of one can read the other and no `meta["val"]` downstream changes.
    """
    a, b = one.meta.get("val"), other.meta.get("val")
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    if (a.dtype, a.device, a.layout, a.dim()) != (b.dtype, b.device, b.layout, b.dim()):
        return False
    pairs = zip((*a.shape, *a.stride()), (*b.shape, *b.stride()), strict=True)
    return all(str(x) == str(y) for x, y in pairs)
