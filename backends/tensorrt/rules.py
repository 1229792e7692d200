"""What TensorRT refuses, computes wrongly, or runs slowly: one small rule each, over an ONNX model.

Measured on the parser and builder of tensorrt-rtx 1.7.1. A rule takes the model and yields findings; adding one is a
function and a line in `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from graphopt.backends.tensorrt.quantizers import (
    WIDE_TYPES,
    Quantizer,
    dequantizer_of,
    is_constant,
    quantizers,
    readers,
)
from graphopt.targets.backend import Finding

Rule = Callable[[ir.Model], Iterator[Finding]]

_NEWEST_OPSET = 25
_MICROSOFT_TAKEN = ("QuantizeLinear", "DequantizeLinear", "Gelu")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_SAME_TYPE = (
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "Min",
    "Max",
    "MatMul",
    "Gemm",
    "Conv",
    "ConvTranspose",
    "Concat",
    "PRelu",
)
_ACTIVATIONS = ("Relu", "Clip", "HardSwish", "Sigmoid", "LeakyRelu", "Gelu", "Elu", "Tanh")


def check_model(model: ir.Model) -> list[Finding]:
    """Apply every rule; errors first."""
    found = [finding for rule in RULES for finding in rule(model)]
    return sorted(found, key=lambda finding: finding.severity != "error")


def _error(node: ir.Node, text: str) -> Finding:
    return Finding("error", node.name or node.op_type, text)


def _warning(node: ir.Node, text: str) -> Finding:
    return Finding("warning", node.name or node.op_type, text)


# Refused by the parser or builder.


def zero_point_is_zero(model: ir.Model) -> Iterator[Finding]:
    """Only zero points of 0."""
    for item in quantizers(model):
        if item.zero_point is not None and bool(np.any(item.zero_point != 0)):
            yield _error(item.node, "its zero point is not 0, which TensorRT refuses. Quantize symmetrically.")


def no_integer_bias(model: ir.Model) -> Iterator[Finding]:
    """No DequantizeLinear of int32."""
    for item in quantizers(model):
        if item.dtype is ir.DataType.INT32:
            yield _error(item.node, "it dequantizes an int32 bias, which TensorRT refuses. Keep the bias in float.")


def at_most_eight_bits(model: ir.Model) -> Iterator[Finding]:
    """No int16 or uint16."""
    for item in quantizers(model):
        if item.dtype in WIDE_TYPES:
            yield _error(
                item.node, f"it uses {item.dtype.name.lower()}, and TensorRT has no 16-bit integers. Use int8."
            )


def positive_scales(model: ir.Model) -> Iterator[Finding]:
    """Scales above zero, and finite."""
    for item in quantizers(model):
        if item.scale is not None and not bool(np.all(np.isfinite(item.scale) & (item.scale > 0))):
            yield _error(item.node, "a scale is zero, negative or not finite, which TensorRT refuses. Calibrate again.")


def no_integer_operators(model: ir.Model) -> Iterator[Finding]:
    """No operators that compute on integers themselves; TensorRT fuses Q/DQ pairs instead."""
    for node in model.graph.all_nodes():
        integer = node.op_type.startswith("QLinear") or node.op_type in ("QGemm", "MatMulInteger", "ConvInteger")
        if integer or node.op_type in ("DynamicQuantizeLinear", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"):
            yield _error(
                node, f"TensorRT has no {node.op_type}. Use QuantizeLinear and DequantizeLinear around the layer."
            )


def one_precision_per_operator(model: ir.Model) -> Iterator[Finding]:
    """No operator whose operands differ in floating type: networks are strongly typed."""
    for node in model.graph.all_nodes():
        if node.op_type not in _SAME_TYPE:
            continue
        types = dict.fromkeys(value.dtype for value in node.inputs if value is not None and value.dtype in _FLOATS)
        if len(types) > 1:
            names = " and ".join(dtype.name.lower() for dtype in types if dtype is not None)
            yield _error(node, f"its operands are {names}. TensorRT does not convert them: put a Cast in front of one.")


def no_fused_attention(model: ir.Model) -> Iterator[Finding]:
    """No ai.onnx Attention in float32, which has no kernel to fuse into."""
    for node in model.graph.all_nodes():
        if node.op_type == "Attention" and node.domain == "" and _first_type(node) is ir.DataType.FLOAT:
            yield _error(node, "TensorRT refuses the operator Attention in float32. Export at opset 22 or below.")


def no_foreign_operators(model: ir.Model) -> Iterator[Finding]:
    """No operators of ONNX Runtime's own, but for a few."""
    for node in model.graph.all_nodes():
        if node.domain == "com.microsoft" and node.op_type not in _MICROSOFT_TAKEN:
            yield _error(node, f"{node.op_type} exists in ONNX Runtime only. Lower without that runtime's fusions.")


def constant_reduction_axes(model: ir.Model) -> Iterator[Finding]:
    """Reductions over axes known when the engine is built."""
    for node in model.graph.all_nodes():
        axes = node.inputs[1] if node.op_type.startswith("Reduce") and len(node.inputs) > 1 else None
        if axes is not None and not is_constant(axes):
            yield _error(node, "its axes are computed, and TensorRT wants constants. Write them as numbers.")


def no_block_weights_with_integers(model: ir.Model) -> Iterator[Finding]:
    """Blocks of int4 weights only with float activations."""
    for node in model.graph.all_nodes():
        if node.op_type not in ("MatMul", "Gemm") or len(node.inputs) < 2:
            continue
        x, weight = (dequantizer_of(value) for value in node.inputs[:2])
        if x is not None and weight is not None and weight.dtype in (ir.DataType.INT4, ir.DataType.UINT4):
            yield _error(node, "int4 weights meet int8 activations, which TensorRT cannot build. Keep its input float.")


def known_opset(model: ir.Model) -> Iterator[Finding]:
    """No opset newer than the parser."""
    opset = model.opset_imports.get("", 1)
    if opset > _NEWEST_OPSET:
        yield Finding("error", "", f"the model is of opset {opset}, TensorRT 11 reads up to {_NEWEST_OPSET}.")


# Accepted, and wrong.


def no_unsigned_integers(model: ir.Model) -> Iterator[Finding]:
    """No uint8: the parser reads it as int8, so that everything above 127 steps saturates."""
    for item in quantizers(model):
        if item.dtype is ir.DataType.UINT8:
            yield _error(item.node, "it uses uint8, which TensorRT reads as int8: half of the range is lost. Use int8.")


def one_scale_per_activation(model: ir.Model) -> Iterator[Finding]:
    """Scales per channel on weights only."""
    for item in quantizers(model):
        if item.per_channel and not item.of_constant:
            yield _error(item.node, "an activation has scales per channel, which only weights can have. Use one scale.")


# Accepted, and slow: the layer runs in float.


def weight_scales_along_outputs(model: ir.Model) -> Iterator[Finding]:
    """Scales per output channel: axis 0 of a convolution, 1 of a transposed one, the last of a matrix product."""
    for node in model.graph.all_nodes():
        weight = dequantizer_of(node.inputs[1]) if len(node.inputs) > 1 else None
        if weight is None or not weight.per_channel or weight.in_blocks:
            continue
        wanted = _output_axis(node, weight)
        if wanted is not None and weight.axis != wanted:
            yield _warning(
                node, f"its weight has scales along axis {weight.axis} instead of {wanted}: it runs in float."
            )


def _output_axis(node: ir.Node, weight: Quantizer) -> int | None:
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        transposed = node.attributes.get("transB")
        return 0 if transposed is not None and transposed.as_int() else 1
    return weight.rank - 1 if node.op_type == "MatMul" else None


def both_sides_quantized(model: ir.Model) -> Iterator[Finding]:
    """A convolution reads integers on both sides or on none."""
    for node in model.graph.all_nodes():
        if node.op_type not in ("Conv", "ConvTranspose"):
            continue
        x, weight = (dequantizer_of(value) for value in node.inputs[:2])
        if (x is None) != (weight is None):
            side = "input" if weight is None else "weight"
            yield _warning(node, f"only its {side} is quantized: it runs in float.")


def equal_scales_at_concat(model: ir.Model) -> Iterator[Finding]:
    """Concat joins integers of one scale."""
    for node in model.graph.all_nodes():
        if node.op_type != "Concat":
            continue
        joined = [dequantizer_of(value) for value in node.inputs]
        scales = [item.scale for item in joined if item is not None and item.scale is not None]
        if len(scales) == len(joined) and any(not np.array_equal(scales[0], scale) for scale in scales[1:]):
            yield _warning(node, "it joins integers of different scales: it runs in float. Give them one scale.")


def quantize_after_activation(model: ir.Model) -> Iterator[Finding]:
    """No quantization between a convolution and its activation."""
    for node in model.graph.all_nodes():
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        for quantize in readers(node.outputs[0], "QuantizeLinear"):
            for dequantize in readers(quantize.outputs[0], "DequantizeLinear"):
                if any(use.node.op_type in _ACTIVATIONS for use in dequantize.outputs[0].uses()):
                    text = "its result is quantized before its activation: what follows runs in float."
                    yield _warning(node, text)


def _first_type(node: ir.Node) -> ir.DataType | None:
    return node.inputs[0].dtype if node.inputs and node.inputs[0] is not None else None


RULES: tuple[Rule, ...] = (
    zero_point_is_zero,
    no_integer_bias,
    at_most_eight_bits,
    positive_scales,
    no_integer_operators,
    one_precision_per_operator,
    no_fused_attention,
    no_foreign_operators,
    constant_reduction_axes,
    no_block_weights_with_integers,
    known_opset,
    no_unsigned_integers,
    one_scale_per_activation,
    weight_scales_along_outputs,
    both_sides_quantized,
    equal_scales_at_concat,
    quantize_after_activation,
)
