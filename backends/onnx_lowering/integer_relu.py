"""Relu between integers as an operator with an integer kernel, where Relu is one more rounding in float.

Given:   QuantizeLinear(Relu(DequantizeLinear(q)))
Result:  QuantizeLinear(Add(DequantizeLinear(q), 0))            where the quantization saturates at 0 by itself
         QuantizeLinear(LeakyRelu(DequantizeLinear(q), alpha=0))  elsewhere: twice as slow, it looks every value up

Left alone: a Relu that something else than QuantizeLinear reads, too, or that is returned; integers of more or fewer
than 8 bits, or of an unknown type.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.backends.onnx_lowering.saturation import saturates_within
from graphopt.backends.onnx_lowering.values import store, value_names
from graphopt.ir.names import Names

_WITH_KERNELS = (ir.DataType.UINT8, ir.DataType.INT8)


class IntegerReluPass(ir.passes.InPlacePass):
    """Rewrite every graph in the model."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite; `modified` says whether there was one."""
        matches = [node for node in model.graph.all_nodes() if _is_between_integers(node)]
        names = value_names(model)
        for node in matches:
            if all(saturates_within(reader, 0.0, float("inf")) for reader in node.outputs[0].consumers()):
                node.op_type = "Add"
                node.resize_inputs(2)
                node.replace_input_with(1, _zero(node, names))
            else:
                node.op_type = "LeakyRelu"
                node.attributes.add(ir.AttrFloat32("alpha", 0.0))
        return ir.passes.PassResult(model, modified=bool(matches))


def _is_between_integers(node: ir.Node) -> bool:
    if node.op_type != "Relu" or node.domain != "" or node.inputs[0] is None or node.outputs[0].is_graph_output():
        return False
    source, readers = node.inputs[0].producer(), node.outputs[0].consumers()
    quantized = bool(readers) and all(reader.op_type == "QuantizeLinear" for reader in readers)
    return quantized and source is not None and _integers_read(source) in _WITH_KERNELS


def _integers_read(node: ir.Node) -> ir.DataType | None:
    """Return the type of what a DequantizeLinear reads, which is that of its zero point; None for another node."""
    if node.op_type != "DequantizeLinear":
        return None
    typed = node.inputs[2] if len(node.inputs) > 2 else node.inputs[0]
    return None if typed is None else typed.dtype


def _zero(node: ir.Node, names: Names) -> ir.Value:
    """Put a zero of the same integers that a node reads before it."""
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    assert source is not None  # by `_is_between_integers`
    assert node.graph is not None
    integers = _integers_read(source)
    assert integers is not None
    zero = np.zeros((), integers.numpy())
    operands = [
        store(node.graph, names.new(name), value)
        for name, value in (("zero", zero), ("zero_scale", np.array(1, np.float32)), ("zero_point", zero))
    ]
    result = ir.Value(name=names.new("zero_read"))
    read = ir.Node("", "DequantizeLinear", operands, outputs=[result], metadata_props=dict(node.metadata_props))
    node.graph.insert_before(node, read)
    return result
