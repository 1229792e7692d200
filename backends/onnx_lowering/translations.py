"""Graph quantization operators as ONNX operators: the table the exporter consults.

    quantize        QuantizeLinear, after a Clip where the range is narrower than the integer type
    dequantize      DequantizeLinear; of blocks, and `unpack`, operators of graphopt's own (`packed_operators`)
    dynamic_quantize  DynamicQuantizeLinear
    dynamic_lstm    DynamicQuantizeLSTM of ONNX Runtime
    stored          an operator of graphopt's own, while exporting (`stored_bytes`)
    sym_numel       Size, which torch's table lacks (2.13): grids of dynamic sizes ask for it

Ranges wider than eight bits have no QuantizeLinear that every runtime takes; they become plain arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset20

import graphopt.quantization.ops  # noqa: F401  (registers the operators)
from graphopt.backends.onnx_lowering.contrib_operators import dynamic_lstm
from graphopt.backends.onnx_lowering.packed_operators import dequantize_blocks, unpack
from graphopt.backends.onnx_lowering.stored_bytes import STORED, write_stored
from graphopt.quantization.formats import storage_dtype
from graphopt.quantization.recurrent import DYNAMIC_LSTM

# Its type variables describe arrays; in a translation the arguments are the exporter's symbolic values.
op: Any = opset20

_EIGHT_BIT = {torch.int8: (ir.DataType.INT8, -128, 127), torch.uint8: (ir.DataType.UINT8, 0, 255)}
_NO_AXIS = 1  # QuantizeLinear ignores the axis of a scalar scale; 1 is its default


def table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return ONNX translations by operator overload, for `torch.onnx.export(custom_translation_table=...)`."""
    ops = torch.ops.graphopt
    return {
        ops.quantize.default: _quantize,
        ops.dequantize.default: _dequantize,
        ops.dynamic_quantize.default: _dynamic_quantize,
        DYNAMIC_LSTM: dynamic_lstm,
        ops.unpack.default: unpack,
        STORED: write_stored,
        torch.ops.aten.sym_numel.default: _numel,
    }


def _quantize(x: Any, scale: Any, zero_point: Any, axis: int | None, low: int, high: int) -> Any:
    dtype = storage_dtype(low, high)
    if dtype not in _EIGHT_BIT:
        return op.Cast(_steps(x, scale, zero_point, axis, low, high), to=ir.DataType.INT32)
    onnx_dtype, smallest, largest = _EIGHT_BIT[dtype]
    if (low, high) != (smallest, largest):
        x = _clamp(x, scale, zero_point, axis, low, high)
    zero = op.Cast(_vector(zero_point, axis), to=onnx_dtype)
    return op.QuantizeLinear(x, _vector(scale, axis), zero, axis=_NO_AXIS if axis is None else axis)


def _dequantize(q: Any, scale: Any, zero_point: Any, axis: int | None, block: int | None = None) -> Any:
    if axis is not None and block is not None:
        return dequantize_blocks(q, scale, zero_point, axis, block)
    along = _NO_AXIS if axis is None else axis
    if q.dtype == ir.DataType.INT32:
        # DequantizeLinear takes int32 only without a zero point: a bias has none.
        return op.DequantizeLinear(q, _vector(scale, axis), axis=along)
    zero = op.Cast(_vector(zero_point, axis), to=q.dtype)
    return op.DequantizeLinear(q, _vector(scale, axis), zero, axis=along)


def _dynamic_quantize(x: Any) -> Any:
    return op.DynamicQuantizeLinear(x)


def _numel(x: Any) -> Any:
    return op.Size(x)


def _steps(x: Any, scale: Any, zero_point: Any, axis: int | None, low: int, high: int) -> Any:
    """round(x / scale) + zero_point, clamped, still floating."""
    zero = op.CastLike(_along(zero_point, x, axis), x)
    shifted = op.Add(op.Round(op.Div(x, _along(scale, x, axis))), zero)
    return op.Clip(shifted, _number(low, x), _number(high, x))


def _clamp(x: Any, scale: Any, zero_point: Any, axis: int | None, low: int, high: int) -> Any:
    """Clamp to the real numbers that `low` and `high` stand for.

    Their quotient by `scale` is within one rounding of an integer, so they quantize to `low` and `high` exactly.
    """
    along = _along(scale, x, axis)
    zero = op.CastLike(_along(zero_point, x, axis), x)
    least, most = (op.Mul(op.Sub(_number(bound, x), zero), along) for bound in (low, high))
    if axis is None:
        return op.Clip(x, least, most)
    return op.Min(op.Max(x, least), most)


def _number(value: int, like: Any) -> Any:
    return op.CastLike(op.Constant(value_float=float(value)), like)


def _vector(vector: Any, axis: int | None) -> Any:
    """Return a per-tensor scale or zero point as a scalar, which every runtime takes; per-channel ones as they are."""
    if axis is not None or len(vector.shape) == 0:
        return vector
    return op.Squeeze(vector)


def _along(vector: Any, x: Any, axis: int | None) -> Any:
    """Shape a scale or zero point so that it broadcasts along `axis` of `x`."""
    if axis is None:
        return _vector(vector, axis)
    shape = [1] * len(x.shape)
    shape[axis] = -1
    return op.Reshape(vector, op.Constant(value_ints=shape))
