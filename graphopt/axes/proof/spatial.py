"""Pooling, resizing and patch extraction: channels pass through, space must be whole."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from graphopt.axes.proof.step import MaskedStep, masked_rule, tensor_result
from graphopt.axes.proof.value import Value, broadcast, compact, from_mask, union
from graphopt.ir.torch_internals import pytree

_POOLS = [
    f"aten::{kind}{rank}d"
    for kind in ("adaptive_max_pool", "avg_pool", "max_pool", "_adaptive_avg_pool")
    for rank in (1, 2, 3)
]
_RESIZES = [
    "aten::upsample_bicubic2d",
    "aten::upsample_bilinear2d",
    "aten::upsample_linear1d",
    "aten::upsample_nearest1d",
    "aten::upsample_nearest2d",
    "aten::upsample_nearest3d",
    "aten::upsample_trilinear3d",
    "aten::_upsample_bicubic2d_aa",
    "aten::_upsample_bilinear2d_aa",
    "aten::_upsample_nearest_exact1d",
    "aten::_upsample_nearest_exact2d",
    "aten::_upsample_nearest_exact3d",
]


@masked_rule(
    *_POOLS,
    *_RESIZES,
    "aten::max_pool1d_with_indices",
    "aten::max_pool2d_with_indices",
    "aten::max_pool3d_with_indices",
)
def over_space(step: MaskedStep) -> Any:
    x = step.first()
    space = _space(step)
    step.require_whole([x.dead[d] for d in space], "space")
    return pytree.tree_map_only(Tensor, lambda t: Value(t, x.dead), step.run())


def _space(step: MaskedStep) -> range:
    found = re.search(r"(\d)d", step.target._schema.name)
    assert found is not None  # each of the names asked for says its number of dimensions
    rank = step.first().tensor.dim()
    return range(rank - int(found[1]), rank)


@masked_rule("aten::adaptive_avg_pool1d", "aten::adaptive_avg_pool2d", "aten::adaptive_avg_pool3d")
def adaptive_average(step: MaskedStep) -> Value:
    """Averaging a dimension to size 1 is a mean over what survives of it."""
    x, space = step.first(), _space(step)
    sizes = step["output_size"]
    single = [d for d in space if (sizes if isinstance(sizes, int) else sizes[d - space[0]]) == 1]
    step.require_whole([x.dead[d] for d in space if d not in single], "space")
    lost = tuple(flags if d in single else None for d, flags in enumerate(x.dead))
    result = tensor_result(step.run(**{step.first_name(): compact(x.tensor, lost)}))
    return Value(result, tuple(None if d in single else flags for d, flags in enumerate(x.dead)))


@masked_rule("aten::max_unpool2d", "aten::max_unpool3d")
def unpool(step: MaskedStep) -> Value:
    """Put values back where pooling found them, in each channel by itself."""
    x, places = step.values()
    space = _space(step)
    dead = broadcast([x.dead, places.dead])
    step.require_whole([dead[d] for d in space], "space")
    return Value(tensor_result(step.run()), dead)


@masked_rule("aten::affine_grid_generator")
def affine_grid(step: MaskedStep) -> Value:
    theta = step.first()
    step.require_whole(theta.dead[1:], "coordinates")
    result = tensor_result(step.run())
    return Value(result, (theta.dead[0], *(None for _ in result.shape[1:])))


@masked_rule("aten::grid_sampler", "aten::grid_sampler_2d", "aten::grid_sampler_3d")
def grid_sampler(step: MaskedStep) -> Value:
    x, grid = step.values()
    step.require_whole([*x.dead[2:], *grid.dead[1:]], "space")
    result = tensor_result(step.run())
    return Value(result, (union(x.dead[0], grid.dead[0]), x.dead[1], *(None for _ in result.shape[2:])))


@masked_rule("aten::im2col")
def im2col(step: MaskedStep) -> Value:
    """(batch, channels, height, width) to (batch, channels * kernel, places)."""
    x = step.first()
    step.require_whole(x.dead[-2:], "space")
    result = tensor_result(step.run())
    channel = x.tensor.dim() - 3
    flags = x.dead[channel]
    if flags is not None:
        flags = flags.repeat_interleave(result.size(channel) // flags.numel())
    return Value(result, (*x.dead[:channel], flags, None))


@masked_rule("aten::col2im")
def col2im(step: MaskedStep) -> Value:
    """(batch, channels * kernel, places) to (batch, channels, height, width): overlaps are summed."""
    x = step.first()
    step.require_whole(x.dead[-1:], "places")
    result = tensor_result(step.run())
    channel = x.tensor.dim() - 2
    flags = x.dead[channel]
    if flags is not None:
        flags, inside = from_mask(flags.view(result.size(channel), -1))
        step.require_whole([inside], "the kernel")
    return Value(result, (*x.dead[:channel], flags, None, None))
