"""Convolutions: channels contract within groups, spatial dimensions are frozen unless nothing mixes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphopt.axes.call import Call
from graphopt.axes.edit import Edit
from graphopt.axes.layout import ONE, Dims, Layout, product
from graphopt.axes.registry import rule


def rewrite_groups(edit: Edit) -> None:
    """Bring the number of groups up to date."""
    if edit.changed(edit.note("groups")):
        edit.set("groups", edit.new_size(edit.note("groups")))


@rule("aten::conv1d", "aten::conv2d", "aten::conv3d", rewrite=rewrite_groups)
def convolution(call: Call) -> Dims:
    return _convolve(call, transposed=False)


@rule(
    "aten::conv_transpose1d",
    "aten::conv_transpose2d",
    "aten::conv_transpose3d",
    rewrite=rewrite_groups,
)
def transposed_convolution(call: Call) -> Dims:
    return _convolve(call, transposed=True)


@rule("aten::convolution", "aten::_convolution", rewrite=rewrite_groups)
def any_convolution(call: Call) -> Dims:
    return _convolve(call, transposed=bool(call.arg("transposed")))


def _convolve(call: Call, *, transposed: bool) -> Dims:
    x, weight = call.dims("input"), call.dims("weight")
    if not isinstance(call.arg("groups"), int):
        call.freeze((*x, *weight), "number of groups computed at run time")
        return call.axes(call.shape(), call.because("number of groups computed at run time"))
    spatial = len(weight) - 2
    *batch, channels = x[: len(x) - spatial]
    groups = call.axis(call.arg("groups"))
    call.note("groups", groups)
    # weight: (groups * out, in, *kernel), or transposed (groups * in, out, *kernel)
    first, second = weight[0], weight[1]
    inner = call.axis(call.ratio(first, groups))
    call.unify(first, product([groups, inner]))
    inputs, outputs = (inner, second) if transposed else (second, inner)
    call.unify(channels, product([groups, inputs]))
    result = product([groups, outputs])
    if call.has("bias"):
        call.unify(call.dims("bias")[0], result)
    call.consumes(call.arg("weight"), 0 if transposed else 1, inputs)
    call.produces(call.arg("weight"), 1 if transposed else 0, outputs)
    call.freeze(weight[2:], "kernel size")
    return (*batch, result, *_spatial(call, x[len(x) - spatial :], weight[2:]))


def _spatial(call: Call, dims: Sequence[Layout], kernel: Sequence[Layout]) -> Dims:
    sizes = call.shape()[-len(dims) :]
    result: list[Layout] = []
    for index, layout in enumerate(dims):
        if kernel[index] == ONE and _leaves_alone(call, index) and call.sized(layout, sizes[index]):
            result.append(layout)
            continue
        call.freeze(layout, "spatial dimension")
        result.append(call.axis(sizes[index], call.because("spatial dimension")))
    return tuple(result)


def _leaves_alone(call: Call, index: int) -> bool:
    padding = call.arg("padding")
    if isinstance(padding, str):
        padding = 0  # a kernel of 1 needs none
    output = call.arg("output_padding") if "output_padding" in call.names() else 0
    return _at(call.arg("stride"), index) == 1 and _at(padding, index) == 0 and _at(output, index) == 0


def _at(value: Any, index: int) -> int:
    if isinstance(value, int):
        return value
    return int(value[index] if len(value) > 1 else value[0]) if value else 0


@rule("aten::im2col")
def im2col(call: Call) -> Dims:
    """Unfold patches: (.., C, H, W) -> (.., C * kh * kw, positions)."""
    *batch, channels, height, width = call.dims("self")
    call.freeze((height, width), "spatial dimension")
    positions = call.shape()[-1]
    kernel = call.axis(_kernel_area(call), call.because("kernel size"))
    return (*batch, product([channels, kernel]), call.axis(positions, call.because("spatial dimension")))


@rule("aten::col2im")
def col2im(call: Call) -> Dims:
    """Fold patches: (.., C * kh * kw, positions) -> (.., C, H, W)."""
    *batch, rows, positions = call.dims("self")
    call.freeze(positions, "spatial dimension")
    *_, channels, height, width = call.shape()
    result = call.axis(channels)
    kernel = call.axis(_kernel_area(call), call.because("kernel size"))
    call.unify(rows, product([result, kernel]))
    return (*batch, result, *call.axes((height, width), call.because("spatial dimension")))


def _kernel_area(call: Call) -> int:
    kernel = call.arg("kernel_size")
    height, width = (kernel[0], kernel[-1]) if isinstance(kernel, list | tuple) else (kernel, kernel)
    return int(height) * int(width)


@rule("aten::pixel_shuffle")
def pixel_shuffle(call: Call) -> Dims:
    """Move r x r sub-pixels from channels into space: (.., C * r * r, H, W) -> (.., C, H * r, W * r)."""
    *batch, channels, height, width = call.dims("self")
    call.freeze((height, width), "spatial dimension")
    *_, wanted, rows, columns = call.shape()
    factor = int(call.arg("upscale_factor"))
    result = call.axis(wanted)
    pixels = call.axes((factor, factor), call.because("sub-pixel position"))
    call.unify(channels, product([result, *pixels]))
    return (*batch, result, *call.axes((rows, columns), call.because("spatial dimension")))


@rule("aten::pixel_unshuffle")
def pixel_unshuffle(call: Call) -> Dims:
    """Move r x r sub-pixels from space into channels."""
    *batch, channels, height, width = call.dims("self")
    call.freeze((height, width), "spatial dimension")
    *_, rows, columns = call.shape()
    factor = int(call.arg("downscale_factor"))
    pixels = call.axes((factor, factor), call.because("sub-pixel position"))
    result = product([channels, *pixels])
    return (*batch, result, *call.axes((rows, columns), call.because("spatial dimension")))


@rule("aten::channel_shuffle", "aten::native_channel_shuffle")
def channel_shuffle(call: Call) -> Dims:
    """Transpose (groups, channels per group) to (channels per group, groups)."""
    batch, channels, *rest = call.dims("self")
    groups = call.axis(int(call.arg("groups")), call.because("number of groups"))
    inner = call.axis(call.ratio(channels, groups))
    call.unify(channels, product([groups, inner]))
    return (batch, product([inner, groups]), *rest)
