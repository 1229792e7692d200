"""Weights of any layer in one form, (groups, outputs, inputs, taps), whatever layout they are stored in.

linear (out, in)                            (1, out, in, 1)
matmul (in, out)                            (1, out, in, 1)
conv (out, in/groups, *k)                   (groups, out/groups, in/groups, prod(k))
transposed conv (in, out/groups, *k)        (groups, out/groups, in/groups, prod(k))
"""

from __future__ import annotations

import math

import torch

from graphopt.passes.layers.weighted_call import WeightedCall


def by_taps(call: WeightedCall, weight: torch.Tensor) -> torch.Tensor:
    """Return the weight of `call`, or a tensor of its layout, as (groups, outputs, inputs, taps)."""
    if call.kind == "matmul":
        return weight.t()[None, :, :, None]
    grouped = torch.unflatten(weight, 0, (call.groups, -1)).unsqueeze(-1).flatten(3)
    return grouped.transpose(1, 2) if call.kind == "transposed conv" else grouped


def from_taps(call: WeightedCall, taps: torch.Tensor) -> torch.Tensor:
    """Return (groups, outputs, inputs, taps), any number of each, in the layout of the weight of `call`, contiguous."""
    if call.kind == "matmul":
        return taps[0, :, :, 0].t().contiguous()
    grouped = taps.transpose(1, 2) if call.kind == "transposed conv" else taps
    flat = grouped.flatten(0, 1)
    return flat.reshape(*flat.shape[:2], *call.kernel).contiguous()


def as_rows(call: WeightedCall, weight: torch.Tensor) -> torch.Tensor:
    """Return the weight as (groups, outputs, taps * inputs), channels innermost."""
    return by_taps(call, weight.detach()).transpose(2, 3).flatten(2)


def as_weight(call: WeightedCall, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return rows in the layout of the weight."""
    return from_taps(call, torch.unflatten(rows, 2, (math.prod(call.kernel), -1)).transpose(2, 3)).to(dtype)


def scale_outputs(call: WeightedCall, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return `weight` such that output feature i is multiplied by `scale[i]` (out,)."""
    return from_taps(call, by_taps(call, weight) * scale.view(call.groups, -1, 1, 1))


def scale_inputs(call: WeightedCall, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return `weight` such that input feature i counts `scale[i]` (in,) times."""
    return from_taps(call, by_taps(call, weight) * scale.view(call.groups, 1, -1, 1))


def response_to(call: WeightedCall, weight: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Return what a constant input `shift` (in,) adds to each output feature (out,), away from any padding.

    Not defined for transposed convolutions, whose border outputs see fewer weights.
    """
    return torch.einsum("goi,gi->go", by_taps(call, weight).sum(3), shift.view(call.groups, -1)).flatten()
