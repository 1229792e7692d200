"""Pooling, resizing and patch extraction: channels pass through, space must be whole."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.axes.oracle.step import Step, masked_rule, tensor_result
from graphopt.axes.oracle.value import Value, from_mask

_POOLS = [
    f"aten::{kind}{rank}d"
    for kind in ("adaptive_avg_pool", "adaptive_max_pool", "avg_pool", "max_pool", "_adaptive_avg_pool")
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
]


@masked_rule(*_POOLS, *_RESIZES, "aten::max_pool1d_with_indices", "aten::max_pool2d_with_indices")
def over_space(step: Step) -> Any:
    x = step.first()
    found = re.search(r"(\d)d", step.target._schema.name)
    assert found is not None  # each of the names above says its number of dimensions
    step.require_whole(x.dead[x.tensor.dim() - int(found[1]) :], "space")
    return pytree.tree_map_only(Tensor, lambda t: Value(t, x.dead), step.run())


@masked_rule("aten::grid_sampler", "aten::grid_sampler_2d", "aten::grid_sampler_3d")
def grid_sampler(step: Step) -> Value:
    x, grid = step.values()
    step.require_whole([*x.dead[2:], *grid.dead], "space")
    return Value(tensor_result(step.run()), x.dead)


@masked_rule("aten::im2col")
def im2col(step: Step) -> Value:
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
def col2im(step: Step) -> Value:
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
