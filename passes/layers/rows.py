"""What a layer's weight is multiplied with, and what it gives, at sampled positions of its output.

At every output position y = sum over inputs and taps of W x, plus b, where

    x (rows, groups, inputs, taps)      is what the weight meets: for a convolution the patch under its kernel,
    W (groups, outputs, inputs, taps)   the weight, see `weights.by_taps`,
    y (rows, groups * outputs)          the output there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from graphopt.ir.graph import arguments
from graphopt.passes.layers.weighted_call import WeightedCall


def positions(call: WeightedCall, output: torch.Tensor) -> int:
    """Return how many rows one batch has: every sample at every output position."""
    return math.prod(output.movedim(_axis(call, output), -1).shape[:-1])


def output_rows(call: WeightedCall, output: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return the rows `chosen` of an output, or of anything of its shape, (rows, outputs)."""
    axis = _axis(call, output)
    moved = output.movedim(axis, -1)
    where = torch.unravel_index(chosen, moved.shape[:-1])
    return moved[where].to(working_dtype(output))


def input_rows(call: WeightedCall, x: torch.Tensor, chosen: torch.Tensor, output: torch.Size) -> torch.Tensor:
    """Return what the weight meets at the output positions `chosen`, (rows, groups, inputs, taps).

    Args:
        call: the layer.
        x: its input.
        chosen: numbers of positions, counted as in `output_rows`.
        output: shape of its output.
    """
    if "conv" not in call.kind:
        return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])[chosen].to(working_dtype(x))[:, None, :, None]
    if x.dim() == len(call.kernel) + 1:  # without a batch
        x, output = x.unsqueeze(0), torch.Size([1, *output])
    patches = _patches(call, x, torch.unravel_index(chosen, (output[0], *output[2:])))  # (rows, *k, in)
    rows = patches.movedim(-1, 1)  # (rows, in, *k)
    return rows.reshape(len(chosen), call.groups, call.in_features // call.groups, -1).to(working_dtype(x))


def working_dtype(values: torch.Tensor) -> torch.dtype:
    """Return the precision rows of these values are multiplied in: at least single."""
    return torch.promote_types(values.dtype, torch.float32)


def _axis(call: WeightedCall, output: torch.Tensor) -> int:
    return output.dim() - len(call.kernel) - 1


def _patches(call: WeightedCall, x: torch.Tensor, where: Sequence[torch.Tensor]) -> torch.Tensor:
    """Gather (rows, *k, in): the input under each tap of the kernel, zero beyond the border.

    Output o meets tap k of a convolution at input o * stride - padding + k * dilation, and of a transposed one at
    (o + padding - k * dilation) / stride where that is whole.
    """
    kernel, rows = call.kernel, len(where[0])
    strides, paddings, dilations = call.strides, _paddings(call), _spread(call, "dilation")
    last = x.movedim(1, -1)
    index = [where[0].view(-1, *[1] * len(kernel))]
    inside = torch.ones(rows, *[1] * len(kernel), dtype=torch.bool)
    for d, taps in enumerate(kernel):
        reach = torch.arange(taps) * dilations[d]
        if call.kind == "transposed conv":
            scaled = where[d + 1].unsqueeze(1) + paddings[d] - reach
            at, meets = scaled.div(strides[d], rounding_mode="floor"), scaled % strides[d] == 0
        else:
            at = where[d + 1].unsqueeze(1) * strides[d] - paddings[d] + reach
            meets = torch.ones_like(at, dtype=torch.bool)
        meets = meets & (at >= 0) & (at < last.shape[d + 1])
        shape = [rows, *(taps if i == d else 1 for i in range(len(kernel)))]
        index.append(at.clamp(0, last.shape[d + 1] - 1).view(shape))
        inside = inside & meets.view(shape)
    return last[tuple(index)] * inside.unsqueeze(-1).to(last.device)


def _paddings(call: WeightedCall) -> list[int]:
    """Return how many zeros stand before the input along each spatial axis."""
    padding = arguments(call.node, ())["padding"]
    if padding == "same":
        return [d * (k - 1) // 2 for d, k in zip(_spread(call, "dilation"), call.kernel, strict=True)]
    return [0] * len(call.kernel) if padding == "valid" else _spread(call, "padding")


def _spread(call: WeightedCall, name: str) -> list[int]:
    given = arguments(call.node, ())[name]
    values = [given] if isinstance(given, int) else list(given)
    return values * len(call.kernel) if len(values) == 1 else values
