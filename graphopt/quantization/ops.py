"""The quantization operators of the graph, with fake and autograd formulas.

    quantize(x)      = clamp(round(x / scale) + zero_point, low, high)      float -> int8, uint8 or int32
    dequantize(q)    = (q - zero_point) * scale                             integer -> dtype of scale
    unpack(bytes)    = (each byte >> 0, bits, 2 * bits, ..) % 2**bits + low    uint8 -> int8 or uint8
    dynamic_quantize(x) = quantize(x) by the range of x itself              float -> uint8, scale, zero point
    fake_quantize(x) = dequantize(quantize(x))                              differentiable, for training
    observe(x)       = x                                                    marks a value to collect statistics of

Rounding is half to even and the quotient is a true division, as ONNX QuantizeLinear defines them. `scale` and
`zero_point` are scalars, or vectors along `axis`; what is dequantized may also have one for each `block` of consecutive
values along `axis`, as in ONNX DequantizeLinear of opset 21. Registered on import; they survive `torch.export`, `.pt2`
and `torch.onnx.export(custom_translation_table=...)`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from graphopt.quantization.formats import storage_dtype


@torch.library.custom_op("graphopt::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, low: int, high: int) -> Tensor:
    """Round `x` to integers in [`low`, `high`]; saturates, also on infinities.

    Args:
        x: any floating tensor.
        scale: positive, scalar, or (x.shape[axis],).
        zero_point: the integer that stands for 0, shape of `scale`.
        axis: the axis that scales differ along, None for one scale.
        low: smallest stored integer.
        high: largest stored integer.
    """
    _check_axis(x, scale, zero_point, axis)
    return to_integers(rounded(x, scale, zero_point, axis, low, high), storage_dtype(low, high))


@quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, low: int, high: int) -> Tensor:
    _check_axis(x, scale, zero_point, axis)
    return torch.empty_like(x, dtype=storage_dtype(low, high))


@torch.library.custom_op("graphopt::dequantize", mutates_args=())
def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, block: int | None = None) -> Tensor:
    """Return the real numbers that the integers `q` stand for, in the dtype of `scale`.

    Args:
        q: any integers.
        scale: scalar, or (q.shape[axis],); with `block` of the shape of `q` but for `axis`, along which there is one
            for each block, the last one shorter perhaps.
        zero_point: the integer that stands for 0, shape of `scale`; with `block` it may be one for all.
        axis: the axis that scales differ along, None for one scale.
        block: consecutive values along `axis` that share a scale, None where each has its own.
    """
    _check_scales(q, scale, zero_point, axis, block)
    shift, factor = (spread(vector, q, axis, block) for vector in (zero_point, scale))
    if q.dtype is torch.int32:
        return (q - shift.to(torch.int32)).to(scale.dtype) * factor
    # differences of 8-bit integers are exact in every floating type
    return q.to(scale.dtype).sub_(shift.to(scale.dtype)).mul_(factor)


@dequantize.register_fake
def _(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, block: int | None = None) -> Tensor:
    _check_scales(q, scale, zero_point, axis, block)
    return torch.empty_like(q, dtype=scale.dtype)


def _dequantize_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, scale, zero_point, ctx.axis, ctx.block = inputs
    ctx.save_for_backward(q, scale, zero_point)


def _dequantize_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, scale, zero_point = ctx.saved_tensors
    if not ctx.needs_input_grad[1]:
        return None, None, None, None, None
    slope = grad * (q.to(grad.dtype) - spread(zero_point, q, ctx.axis, ctx.block).to(grad.dtype))
    return None, _reduce(slope, scale, ctx.axis, ctx.block), None, None, None


dequantize.register_autograd(_dequantize_backward, setup_context=_dequantize_setup)


@torch.library.custom_op("graphopt::dynamic_quantize", mutates_args=())
def dynamic_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round `x` to uint8 by its own range, as ONNX DynamicQuantizeLinear does.

        scale = (max(x, 0) - min(x, 0)) / 255        zero_point = round(-min(x, 0) / scale)

    Args:
        x: any floating tensor. Every value of it, whatever sample it belongs to, has a say in the scale.

    Returns:
        Integers of the shape of `x`, and their scale and zero point, scalars.
    """
    bounds = x.new_zeros(2) if x.numel() == 0 else torch.stack(torch.aminmax(x))
    low, high = bounds[0].clamp(max=0), bounds[1].clamp(min=0)
    scale = torch.where(high == low, 1.0, (high - low) / 255)
    zero_point = torch.round(-low / scale).clamp_(0, 255)
    integers = torch.round(x / scale).add_(zero_point).clamp_(0, 255)
    return to_integers(integers, torch.uint8), scale, zero_point.to(torch.uint8)


@dynamic_quantize.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.uint8), x.new_empty(()), x.new_empty((), dtype=torch.uint8)


@torch.library.custom_op("graphopt::fake_quantize", mutates_args=())
def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    low: int,
    high: int,
    block: int | None = None,
    gain: float = 1.0,
) -> Tensor:
    """Round `x` to what its integers stand for, keeping it floating, with gradients.

    The gradient to `x` passes straight through where `x` is in range and stops where it saturates; the gradient
    to `scale` is `gain` times that of learned step sizes (Esser et al. 2020, "Learned Step Size Quantization",
    equation 3; the gain is that of section 2.2, see `step_gain`). Scales are those of `dequantize`.
    """
    _check_scales(x, scale, zero_point, axis, block)
    steps = rounded(x, scale, zero_point, axis, low, high, block)
    return steps.sub_(spread(zero_point, x, axis, block).to(x.dtype)).mul_(spread(scale, x, axis, block))


@fake_quantize.register_fake
def _(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    low: int,
    high: int,
    block: int | None = None,
    gain: float = 1.0,
) -> Tensor:
    _check_scales(x, scale, zero_point, axis, block)
    return torch.empty_like(x)


def step_gain(count: int, high: int) -> float:
    """Return what the gradient of a learned step is multiplied with, so that it changes as fast as what it rounds.

    Args:
        count: values of a sample, or of a weight, that share the step.
        high: largest integer.
    """
    return 1 / math.sqrt(max(count, 1) * max(high, 1))


def _fake_quantize_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, ctx.axis, ctx.low, ctx.high, ctx.block, ctx.gain = inputs
    ctx.save_for_backward(x, scale, zero_point)


def _fake_quantize_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, zero_point = ctx.saved_tensors
    shift = spread(zero_point, x, ctx.axis, ctx.block).to(x.dtype)
    exact = x / spread(scale, x, ctx.axis, ctx.block)
    steps = torch.round(exact).add_(shift)
    allowed = steps.clamp(ctx.low, ctx.high)
    inside = steps.eq_(allowed)  # 1 or 0: faster than `where`
    to_x = grad * inside if ctx.needs_input_grad[0] else None
    to_scale = None
    if ctx.needs_input_grad[1]:
        slope = allowed.sub_(shift).sub_(exact.mul_(inside)).mul_(grad)
        to_scale = ctx.gain * _reduce(slope, scale, ctx.axis, ctx.block)
    return to_x, to_scale, None, None, None, None, None, None


fake_quantize.register_autograd(_fake_quantize_backward, setup_context=_fake_quantize_setup)


@torch.library.custom_op("graphopt::observe", mutates_args=())
def observe(x: Tensor, name: str) -> Tensor:
    """Return `x`; calibration collects the statistics of what passes here under `name`."""
    return x.clone()


@observe.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


def _observe_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


observe.register_autograd(_observe_backward)


@torch.library.custom_op("graphopt::unpack", mutates_args=())
def unpack(packed: Tensor, size: int, bits: int, low: int) -> Tensor:
    """Return the integers that `pack` put into bytes.

    Args:
        packed: (..., bytes) uint8, the first integer in the lowest bits.
        size: integers along the last axis; bits beyond them are not read.
        bits: of one integer: 1, 2 or 4.
        low: the integer whose bits are 0.

    Returns:
        (..., size) int8 where `low` is negative, else uint8.
    """
    _check_packed(packed, size, bits)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = (packed.unsqueeze(-1) >> shifts).bitwise_and_((1 << bits) - 1).flatten(-2)[..., :size]
    return codes.to(_packed_dtype(bits, low)) + low


@unpack.register_fake
def _(packed: Tensor, size: int, bits: int, low: int) -> Tensor:
    _check_packed(packed, size, bits)
    return packed.new_empty((*packed.shape[:-1], size), dtype=_packed_dtype(bits, low))


def pack(integers: Tensor, bits: int, low: int) -> Tensor:
    """Put integers in [low, low + 2**bits) into bytes, several along the last axis in each; see `unpack`."""
    per_byte = 8 // bits
    codes = (integers.to(torch.int16) - low).to(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_byte))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    grouped = codes.reshape(*codes.shape[:-1], codes.shape[-1] // per_byte, per_byte)
    return (grouped << shifts).sum(-1, dtype=torch.uint8)


def rounded(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, low: int, high: int, block: int | None = None
) -> Tensor:
    """Return the integers that `x` is rounded to, as a new tensor of its own type."""
    steps = (x / spread(scale, x, axis, block)).round_()
    return steps.add_(spread(zero_point, x, axis, block).to(x.dtype)).clamp_(low, high)


def to_integers(whole: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert whole numbers that are within the range of `dtype`, but for what the largest of int32 is as a float."""
    if dtype is torch.int32:
        limits = torch.iinfo(dtype)
        return whole.to(torch.int64).clamp_(limits.min, limits.max).to(dtype)
    # by way of int16, uint8 takes a quarter of the time (torch 2.13)
    return whole.to(torch.int16).to(dtype) if dtype is torch.uint8 else whole.to(dtype)


# The operators as they stand in graphs.
QUANTIZE = torch.ops.graphopt.quantize.default
DEQUANTIZE = torch.ops.graphopt.dequantize.default
DYNAMIC_QUANTIZE = torch.ops.graphopt.dynamic_quantize.default
FAKE_QUANTIZE = torch.ops.graphopt.fake_quantize.default
OBSERVE = torch.ops.graphopt.observe.default
UNPACK = torch.ops.graphopt.unpack.default


def _along(vector: Tensor, rank: int, axis: int | None) -> Tensor:
    """View a scale or zero point so that it broadcasts along `axis`."""
    if axis is None:
        return vector.reshape(())
    shape = [1] * rank
    shape[axis] = -1
    return vector.reshape(shape)


def spread(vector: Tensor, x: Tensor, axis: int | None, block: int | None) -> Tensor:
    """Broadcast a scale or zero point to `x`, repeating those of blocks."""
    if block is None or axis is None or vector.dim() == 0:
        return _along(vector, x.dim(), None if block is not None else axis)
    size = x.shape[axis]
    return vector.repeat_interleave(min(block, max(size, 1)), axis).narrow(axis, 0, size)


def _reduce(values: Tensor, scale: Tensor, axis: int | None, block: int | None) -> Tensor:
    """Sum over everything that one scale covers."""
    if block is not None and axis is not None:
        blocks = torch.arange(values.shape[axis], device=values.device) // block
        return torch.zeros_like(scale).index_add_(axis, blocks, values)
    if axis is None:
        return values.sum().reshape(scale.shape)
    others = [dim for dim in range(values.dim()) if dim != axis % values.dim()]
    return values.sum(dim=others) if others else values


def _check_axis(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> None:
    """Refuse what would broadcast: the result has the shape of `x`."""
    if axis is None:
        fits = scale.numel() == 1 and zero_point.numel() == 1
    else:
        wanted = (x.shape[axis],) if -x.dim() <= axis < x.dim() else None
        fits = scale.shape == wanted and zero_point.shape == wanted
    if not fits:
        raise ValueError(
            f"Scales of shape {tuple(scale.shape)} and zero points of shape {tuple(zero_point.shape)} do not fit axis "
            f"{axis} of {tuple(x.shape)}."
        )


def _check_scales(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, block: int | None) -> None:
    """Refuse what would broadcast, of scales of blocks too."""
    if block is None:
        _check_axis(q, scale, zero_point, axis)
        return
    if axis is None or block < 1 or not -q.dim() <= axis < q.dim():
        raise ValueError(f"There are no blocks of {block} along axis {axis} of {tuple(q.shape)}.")
    wanted = list(q.shape)
    wanted[axis] = -(-wanted[axis] // block)
    if scale.shape != tuple(wanted) or zero_point.shape not in ((), scale.shape):
        raise ValueError(
            f"Scales of shape {tuple(scale.shape)} and zero points of shape {tuple(zero_point.shape)} do not fit "
            f"blocks of {block} along axis {axis} of {tuple(q.shape)}."
        )


def _check_packed(packed: Tensor, size: int, bits: int) -> None:
    if bits not in (1, 2, 4) or packed.dtype is not torch.uint8 or packed.dim() == 0:
        raise ValueError(f"Integers of {bits} bits are not read from {packed.dtype} of {packed.dim()} axes.")
    if not 0 <= 8 * packed.shape[-1] - size * bits < 8:
        raise ValueError(f"{size} integers of {bits} bits are not in {packed.shape[-1]} bytes.")


def _packed_dtype(bits: int, low: int) -> torch.dtype:
    dtype = storage_dtype(low, low + (1 << bits) - 1)
    if dtype is torch.int32:
        raise ValueError(f"Integers of {bits} bits from {low} on do not fit 8 bits.")
    return dtype
