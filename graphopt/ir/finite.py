"""Types of number that torch only stores, and whether a tensor of any type holds NaN or infinite values."""

from __future__ import annotations

import torch


def all_finite(tensor: torch.Tensor) -> bool:
    """Tell whether every element is finite. Integers always are, and so is float4, which has no other values.

    The extremes are NaN or infinite where any element is, and nothing is written to find them: `isfinite` writes a mask
    first (twenty times as slow on 16 M elements).
    """
    whole = not tensor.is_floating_point() and not tensor.is_complex()
    if whole or tensor.dtype is torch.float4_e2m1fn_x2 or not tensor.numel():
        return True
    if tensor.is_complex():
        return bool(torch.isfinite(tensor).all())
    if only_stored(tensor.dtype):  # what is narrow does not overflow in float64
        return bool(torch.isfinite(tensor.detach().sum(dtype=torch.float64)))
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor.detach()))


def only_stored(dtype: torch.dtype) -> bool:
    """Tell whether torch stores numbers of a type and does not compute in it: float8 of every kind, and float4."""
    return dtype.is_floating_point and dtype.itemsize == 1


def computable(tensor: torch.Tensor) -> torch.Tensor:
    """Return values that every operator takes.

    Those of float8 are float32, which holds them exactly; those of float4, which torch does not unpack, the bytes that
    hold two each; others as they are.
    """
    if tensor.dtype is torch.float4_e2m1fn_x2:
        return tensor.view(torch.uint8)
    return tensor.float() if only_stored(tensor.dtype) else tensor
