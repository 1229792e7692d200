"""Pooling and resampling: batch and channels pass, spatial positions are mixed with their neighbours."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.axes.call import Call
from graphopt.axes.layout import ONE, Dims, Layout, Size
from graphopt.axes.registry import rule

_REASON = "spatial dimension"


def _resampled(call: Call, dims: Dims, count: int, sizes: Sequence[Size]) -> Dims:
    cut = len(dims) - count
    call.freeze(dims[cut:], _REASON)
    return (*dims[:cut], *call.axes(sizes[cut:], call.because(_REASON)))


def _rank(call: Call) -> int:
    """Return how many dimensions the operator's name says are spatial: max_pool2d, upsample_nearest1d."""
    name = call.where.split(" ")[0]
    return next(count for count in (1, 2, 3) if f"{count}d" in name)


@rule(
    "aten::avg_pool1d",
    "aten::avg_pool2d",
    "aten::avg_pool3d",
    "aten::max_pool1d",
    "aten::max_pool2d",
    "aten::max_pool3d",
    "aten::reflection_pad1d",
    "aten::reflection_pad2d",
    "aten::reflection_pad3d",
    "aten::replication_pad1d",
    "aten::replication_pad2d",
    "aten::replication_pad3d",
    "aten::upsample_bicubic2d",
    "aten::_upsample_bicubic2d_aa",
    "aten::upsample_bilinear2d",
    "aten::_upsample_bilinear2d_aa",
    "aten::upsample_linear1d",
    "aten::upsample_nearest1d",
    "aten::upsample_nearest2d",
    "aten::upsample_nearest3d",
    "aten::_upsample_nearest_exact1d",
    "aten::_upsample_nearest_exact2d",
    "aten::_upsample_nearest_exact3d",
    "aten::upsample_trilinear3d",
)
def resample(call: Call) -> Dims:
    return _resampled(call, call.tensors()[0], _rank(call), call.shape())


@rule("aten::adaptive_avg_pool1d", "aten::adaptive_avg_pool2d", "aten::adaptive_avg_pool3d")
def adaptive_average(call: Call) -> Dims:
    """Averaging a whole dimension to size 1 is a mean, in which the order of positions does not matter."""
    dims, count, sizes = call.dims("self"), _rank(call), call.shape()
    cut = len(dims) - count
    result: list[Layout] = list(dims[:cut])
    for layout, length in zip(dims[cut:], sizes[cut:], strict=True):
        if length != 1:
            call.freeze(layout, _REASON)
        result.append(ONE if length == 1 else call.axis(length, call.because(_REASON)))
    return tuple(result)


@rule(
    "aten::adaptive_max_pool1d",
    "aten::adaptive_max_pool2d",
    "aten::adaptive_max_pool3d",
    "aten::max_pool1d_with_indices",
    "aten::max_pool2d_with_indices",
    "aten::max_pool3d_with_indices",
)
def pool_and_where(call: Call) -> list[Dims | None]:
    result = _resampled(call, call.tensors()[0], _rank(call), call.shape(0))
    return [result, result]


@rule("aten::max_unpool2d", "aten::max_unpool3d")
def unpool(call: Call) -> Dims:
    """Put values back where pooling found them."""
    dims, places = call.dims("self"), call.dims("indices")
    call.unify_dims(dims, places)
    return _resampled(call, dims, _rank(call), call.shape())


@rule("aten::grid_sampler", "aten::grid_sampler_2d", "aten::grid_sampler_3d")
def grid_sample(call: Call) -> Dims:
    dims, grid = call.dims("input"), call.dims("grid")
    call.unify(dims[0], grid[0])
    call.freeze((*dims[2:], *grid[1:]), _REASON)
    return (dims[0], dims[1], *grid[1:-1])
