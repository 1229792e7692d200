"""Biases of integer convolutions as integers, for models in which ONNX Runtime must not make them itself.

Given:   Conv(DequantizeLinear(x, sx), DequantizeLinear(w, sw), b)
Result:  Conv(DequantizeLinear(x, sx), DequantizeLinear(w, sw), DequantizeLinear(round(b / (sx * sw)), sx * sw))

The optimizer that does the same (WeightBiasQuantization, 1.31.1) also rounds the float weight of a layer that stands
between integers, with one scale for all of it. Without it a convolution with a float bias does not reach its integer
kernel.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.backends.onnx_lowering.values import store, value_names
from graphopt.ir.names import Names

_LARGEST = np.iinfo(np.int32).max


def has_float_layer_between_integers(model: ir.Model) -> bool:
    """Whether a layer reads integers and has a float weight, which the runtime's optimizer would round."""
    layers = [node for node in model.graph.all_nodes() if node.op_type in ("Conv", "ConvTranspose", "Gemm")]
    return any(_scale(node.inputs[0]) is not None and _scale(node.inputs[1]) is None for node in layers)


def store_integer_biases(model: ir.Model) -> None:
    """Rewrite every graph; a bias that does not fit 32 bits stays."""
    names = value_names(model)
    for graph in model.graphs():
        for node in [node for node in graph if node.op_type == "Conv" and len(node.inputs) > 2]:
            _store(graph, node, names)


def _store(graph: ir.Graph, node: ir.Node, names: Names) -> None:
    bias = node.inputs[2]
    scales = _scale(node.inputs[0]), _scale(node.inputs[1])
    if bias is None or bias.const_value is None or scales[0] is None or scales[1] is None:
        return
    scale = (scales[0].astype(np.float32) * scales[1].astype(np.float32)).reshape(-1)
    steps = np.rint(bias.const_value.numpy().astype(np.float64) / scale)
    if np.abs(steps).max(initial=0) > _LARGEST:
        return
    stored = [
        store(graph, names.new(f"{bias.name}_{what}"), array)
        for what, array in (("int32", steps.astype(np.int32)), ("scale", scale if len(scale) > 1 else scale[0]))
    ]
    read = ir.node("DequantizeLinear", stored, {"axis": 0} if len(scale) > 1 else {})
    read.outputs[0].name, read.outputs[0].shape = names.new(f"{bias.name}_read"), bias.shape
    read.outputs[0].type = bias.type
    graph.insert_before(node, read)
    node.replace_input_with(2, read.outputs[0])


def _scale(value: ir.Value | None) -> np.ndarray | None:
    """Return the stored scale of what is dequantized, None for anything else."""
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != "DequantizeLinear":
        return None
    scale = producer.inputs[1]
    return None if scale is None or scale.const_value is None else np.asarray(scale.const_value.numpy())
