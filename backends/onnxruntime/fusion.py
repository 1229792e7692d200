"""Which layers reach ONNX Runtime's integer kernels: read off the graph its optimizer makes of an artifact.

The runtime says nothing when a layer that was quantized runs in float after all. Its optimized graph does: node
names survive (with a suffix), so each quantized layer of the artifact is looked up there, and those left float get
the reason where it is known.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from graphopt.backends.onnx_execution.session import OnnxSession, SessionSettings
from graphopt.files import ScratchDirectory

# Operators that pay for quantizing: those whose float form is a loss worth reporting.
_LAYERS = ("Conv", "Gemm", "MatMul")
_FOLLOWERS = ("Add", "Mul", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat", "Sigmoid", "LeakyRelu")
_STORED = ("MatMulNBits", "GatherBlockQuantized")  # read integers that are stored, whatever else they read
_RESHAPES = ("Squeeze", "Unsqueeze", "Reshape", "Flatten", "Transpose")
_INTEGER_KERNELS = {
    "Conv": ("QLinearConv", "ConvInteger"),
    "Gemm": ("QGemm", "MatMulIntegerToFloat", "QLinearMatMul"),
    "MatMul": (
        "QLinearMatMul",
        "MatMulIntegerToFloat",
        "MatMulInteger",
        "DynamicQuantizeMatMul",
        "MatMulNBits",
        "QGemm",
    ),
    "MatMulInteger": ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"),
    "Add": ("QLinearAdd",),
    "Mul": ("QLinearMul",),
    "MaxPool": ("MaxPool", "NhwcMaxPool"),
    "AveragePool": ("QLinearAveragePool",),
    "GlobalAveragePool": ("QLinearGlobalAveragePool",),
    "Concat": ("QLinearConcat", "Concat"),
    "Sigmoid": ("QLinearSigmoid",),
    "LeakyRelu": ("QLinearLeakyRelu",),
    "MatMulNBits": ("MatMulNBits",),
    "GatherBlockQuantized": ("GatherBlockQuantized",),
}


@dataclass(frozen=True, slots=True)
class Layer:
    """A quantized operator of the artifact and what became of it.

    Attributes:
        name: its ONNX node.
        operator: its ONNX operator.
        kernel: the operator that runs in its place, "" if it was merged into something the names do not tell.
        integer: whether that is an integer kernel.
        reason: why it is not, "" if it is or nobody knows.
    """

    name: str
    operator: str
    kernel: str
    integer: bool
    reason: str = ""


def optimized_graph(path: Path, settings: SessionSettings) -> onnx.GraphProto:
    """Return the graph ONNX Runtime makes of the artifact at `path`, without its large tensors.

    Raises:
        LoweringError: the runtime refuses the artifact.
    """
    with ScratchDirectory() as folder:
        target = Path(folder) / "optimized.onnx"
        config = {**(settings.config or {}), "session.optimized_model_external_initializers_file_name": "weights"}
        config["session.optimized_model_external_initializers_min_size_in_bytes"] = "1024"
        OnnxSession(path, dataclasses.replace(settings, config=config), optimized=target)
        return onnx.load(target, load_external_data=False).graph


def quantized_layers(path: Path, settings: SessionSettings) -> list[Layer]:
    """List every operator of the artifact that reads and should compute on integers, in graph order."""
    model = ir.load(path)
    wanted = [node for node in model.graph if _is_quantized(node)]
    if not wanted:
        return []
    kernels = {node.name: node.op_type for node in optimized_graph(path, settings).node}
    layers = []
    for node in wanted:
        kernel = _kernel(str(node.name), kernels)
        integer = kernel in _INTEGER_KERNELS[node.op_type]
        layers.append(Layer(str(node.name), node.op_type, kernel, integer, "" if integer else _reason(node)))
    return layers


def kernel_counts(path: Path, settings: SessionSettings) -> dict[str, int]:
    """Count the operators of the optimized graph."""
    counts = Counter(node.op_type for node in optimized_graph(path, settings).node)
    return dict(sorted(counts.items()))


def _kernel(name: str, kernels: dict[str, str]) -> str:
    """Find the node that replaced `name`: the runtime appends `_token_N` or `/WhatFusion`."""
    if name in kernels:
        return kernels[name]
    grown = (kernel for key, kernel in kernels.items() if key.startswith((f"{name}_token_", f"{name}/")))
    return next(grown, "")


def _is_quantized(node: ir.Node) -> bool:
    if node.domain != "":
        return node.domain == "com.microsoft" and node.op_type in _STORED
    if node.op_type == "MatMulInteger":
        return True
    if node.op_type in _LAYERS:
        return len(node.inputs) >= 2 and all(_dequantizes(value) for value in node.inputs[:2])
    if node.op_type in _FOLLOWERS:
        return all(_dequantizes(value) for value in node.inputs) and _has_quantized_result(node)
    return False


def _dequantizes(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def _has_quantized_result(node: ir.Node) -> bool:
    """Whether the result is quantized, behind a reshape perhaps: the runtime quantizes in front of it instead."""
    return any(
        user.op_type == "QuantizeLinear" or (user.op_type in _RESHAPES and _has_quantized_result(user))
        for user in _users(node)
    )


def _users(node: ir.Node) -> Iterator[ir.Node]:
    for use in node.outputs[0].uses():
        yield use.node


def _reason(node: ir.Node) -> str:
    """Say why the runtime leaves a quantized operator float; the causes are measured (1.31.1)."""
    activation = next((user for user in _users(node) if user.op_type in ("Relu", "Clip")), None)
    if node.op_type == "Gemm" and len(node.inputs) > 2 and not _dequantizes(node.inputs[2]):
        return "its bias is float; QGemm takes an int32 one"
    if _signed(node.inputs[0]):
        return "its activations are int8; a value with several readers then stays float, use uint8"
    if activation is not None and any(_off_zero(user) for user in _users(activation)):
        return f"{activation.op_type} stands in front of the quantization of its result, whose zero point is not 0"
    if any(_read_often(result.outputs[0]) for result in (node, activation) if result is not None):
        return "its result is read both quantized and in float"
    if node.op_type == "Conv" and not _has_quantized_result(node):
        return "its result is not quantized, and the convolution kernel only writes integers"
    if node.op_type == "MatMul" and any(user.op_type == "Add" for user in _users(node)):
        return "MatMulAddFusion made a float Gemm of it and its bias"
    return ""


def _off_zero(node: ir.Node) -> bool:
    """Whether this is a quantization whose zero point is not 0."""
    if node.op_type != "QuantizeLinear":
        return False
    zero = node.inputs[2].const_value if len(node.inputs) > 2 and node.inputs[2] is not None else None
    return zero is not None and bool(zero.numpy().any())


def _read_often(value: ir.Value) -> bool:
    return len(list(value.uses())) + value.is_graph_output() > 1


def _signed(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.inputs[0] is not None and producer.inputs[0].dtype == ir.DataType.INT8
