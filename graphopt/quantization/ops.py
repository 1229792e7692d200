"""The quantization operators of the graph, with fake and autograd formulas.

    quantize(x)      = clamp(round(x / scale) + zero_point, low, high)      float -> int8, uint8 or int32
    dequantize(q)    = (q - zero_point) * scale                             integer -> dtype of scale
    fake_quantize(x) = dequantize(quantize(x))                              differentiable, for training
    observe(x)       = x                                                    marks a value to collect statistics of

Rounding is half to even and the quotient is a true division, as ONNX QuantizeLinear defines them. `scale` and
`zero_point` are scalars, or vectors along `axis`. Registered on import; they survive `torch.export`, `.pt2` and
`torch.onnx.export(custom_translation_table=...)`.
"""

from __future__ import annotations

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
    steps = _steps(x, scale, zero_point, axis)
    return steps.clamp_(low, high).to(storage_dtype(low, high))


@quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, low: int, high: int) -> Tensor:
    _check_axis(x, scale, zero_point, axis)
    return torch.empty_like(x, dtype=storage_dtype(low, high))


@torch.library.custom_op("graphopt::dequantize", mutates_args=())
def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """Return the real numbers that the integers `q` stand for, in the dtype of `scale`."""
    _check_axis(q, scale, zero_point, axis)
    shift = _along(zero_point, q.dim(), axis)
    if q.dtype is torch.int32:
        return (q - shift.to(torch.int32)).to(scale.dtype) * _along(scale, q.dim(), axis)
    # differences of 8-bit integers are exact in every floating type
    return q.to(scale.dtype).sub_(shift.to(scale.dtype)).mul_(_along(scale, q.dim(), axis))


@dequantize.register_fake
def _(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    _check_axis(q, scale, zero_point, axis)
    return torch.empty_like(q, dtype=scale.dtype)


def _dequantize_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, scale, zero_point, ctx.axis = inputs
    ctx.save_for_backward(q, scale, zero_point)


def _dequantize_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, scale, zero_point = ctx.saved_tensors
    if not ctx.needs_input_grad[1]:
        return None, None, None, None
    centred = q.to(grad.dtype) - _along(zero_point, q.dim(), ctx.axis).to(grad.dtype)
    return None, _reduce(grad * centred, scale, ctx.axis), None, None


dequantize.register_autograd(_dequantize_backward, setup_context=_dequantize_setup)


@torch.library.custom_op("graphopt::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, low: int, high: int) -> Tensor:
    """Round `x` to what its integers stand for, keeping it floating, with gradients.

    The gradient to `x` passes straight through where `x` is in range and stops where it saturates; the gradient
    to `scale` is that of learned step sizes (Esser et al. 2020, "Learned Step Size Quantization", equation 3).
    """
    _check_axis(x, scale, zero_point, axis)
    steps = _steps(x, scale, zero_point, axis).clamp_(low, high)
    return (steps - _along(zero_point, x.dim(), axis).to(x.dtype)) * _along(scale, x.dim(), axis)


@fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, low: int, high: int) -> Tensor:
    _check_axis(x, scale, zero_point, axis)
    return torch.empty_like(x)


def _fake_quantize_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, ctx.axis, ctx.low, ctx.high = inputs
    ctx.save_for_backward(x, scale, zero_point)


def _fake_quantize_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, zero_point = ctx.saved_tensors
    shift = _along(zero_point, x.dim(), ctx.axis).to(x.dtype)
    exact = x / _along(scale, x.dim(), ctx.axis)
    steps = torch.round(exact) + shift
    inside = (steps >= ctx.low) & (steps <= ctx.high)
    to_x = torch.where(inside, grad, 0.0) if ctx.needs_input_grad[0] else None
    to_scale = None
    if ctx.needs_input_grad[1]:
        slope = torch.where(inside, steps - shift - exact, steps.clamp(ctx.low, ctx.high) - shift)
        to_scale = _reduce(grad * slope, scale, ctx.axis)
    return to_x, to_scale, None, None, None, None


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

# The operators as they stand in graphs.
QUANTIZE = torch.ops.graphopt.quantize.default
DEQUANTIZE = torch.ops.graphopt.dequantize.default
OBSERVE = torch.ops.graphopt.observe.default


def _steps(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """Return round(x / scale) + zero_point as a new floating tensor."""
    return torch.round(x / _along(scale, x.dim(), axis)).add_(_along(zero_point, x.dim(), axis).to(x.dtype))


def _along(vector: Tensor, rank: int, axis: int | None) -> Tensor:
    """View a scale or zero point so that it broadcasts along `axis`."""
    if axis is None:
        return vector.reshape(())
    shape = [1] * rank
    shape[axis] = -1
    return vector.reshape(shape)


def _reduce(values: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    """Sum over everything that one scale covers."""
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
