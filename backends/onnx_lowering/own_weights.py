"""Give every operator stored values of its own, which ONNX Runtime may have to rewrite for it.

Given:   d = DequantizeLinear(w, s, zero); Conv(x, d); Conv(y, d)
Result:  Conv(x, DequantizeLinear(w, s, w_zero_point))
         w1 = Reshape(w, shape of w);  Conv(y, DequantizeLinear(w1, s, w_zero_point_1))
         w2 = Reshape(w1, shape of w); and so on: equal expressions would be made one again

On x86 without VNNI the runtime turns int8 weights to uint8 where it is asked to be precise, and fails on what it has
turned already ("Attempt to replace the existing tensor", 1.31.1). It folds the Reshape before: the file holds the
weight once. Left alone: what has one reader. An LSTM reads its integers itself, without a DequantizeLinear.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.backends.onnx_lowering.values import store, value_names
from graphopt.ir.names import Names

# operator: which of its inputs are a stored weight and the zero point of that
_STORED = {"DequantizeLinear": ((0, 2),), "MatMulInteger": ((1, 3),), "DynamicQuantizeLSTM": ((1, 9), (2, 11))}


class OwnWeightsPass(ir.passes.InPlacePass):
    """Separate what several operators share of stored weights."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every graph."""
        modified = False
        names = value_names(model)
        for graph in model.graphs():
            latest: dict[ir.Value, ir.Value] = {}  # of each stored weight, what its last reader reads
            for node in [node for node in graph if stored_integers(node)]:
                copies = _copies_for_further_readers(graph, node) if node.op_type == "DequantizeLinear" else []
                for own in (node, *copies):
                    for weight, zero in _STORED[own.op_type]:
                        modified |= _separate(graph, own, weight, zero, latest, names)
        return ir.passes.PassResult(model, modified=modified)


def stored_integers(node: ir.Node) -> list[ir.Value]:
    """Return the int8 weights stored in the model that a node reads, the other way round perhaps."""
    weights = (node.inputs[weight] for weight, _ in _STORED.get(node.op_type, ()))
    found = (_stored(weight) for weight in weights if weight is not None and weight.dtype == ir.DataType.INT8)
    return [value for value in found if value is not None]


def _stored(value: ir.Value) -> ir.Value | None:
    producer = value.producer()
    if producer is None or producer.op_type not in ("Transpose", "Reshape") or producer.inputs[0] is None:
        return value if value.is_initializer() else None
    return _stored(producer.inputs[0])


def _copies_for_further_readers(graph: ir.Graph, node: ir.Node) -> list[ir.Node]:
    copies = []
    for use in list(node.outputs[0].uses())[1:]:
        copy = ir.node("DequantizeLinear", node.inputs, node.attributes, metadata_props=dict(node.metadata_props))
        copy.outputs[0].shape, copy.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
        graph.insert_after(node, copy)
        use.node.replace_input_with(use.idx, copy.outputs[0])
        copies.append(copy)
    return copies


def _separate(
    graph: ir.Graph, node: ir.Node, weight_at: int, zero_at: int, latest: dict[ir.Value, ir.Value], names: Names
) -> bool:
    """Let a node share nothing with those that read the weights seen so far."""
    weight, zero = node.inputs[weight_at], node.inputs[zero_at] if len(node.inputs) > zero_at else None
    assert weight is not None  # by `stored_integers`
    shared = zero is not None and zero.const_value is not None and len(list(zero.uses())) > 1
    if zero is not None and zero.const_value is not None and shared:
        own = store(graph, names.new(f"{weight.name}_zero_point"), zero.const_value.numpy())
        node.replace_input_with(zero_at, own)
    if weight not in latest:
        latest[weight] = weight
        return shared
    latest[weight] = _reshaped_to_itself(graph, node, latest[weight], names)
    node.replace_input_with(weight_at, latest[weight])
    return True


def _reshaped_to_itself(graph: ir.Graph, before: ir.Node, weight: ir.Value, names: Names) -> ir.Value:
    assert weight.shape is not None  # it is stored
    sizes = store(graph, names.new(f"{weight.name}_shape"), np.array(weight.shape.numpy(), dtype=np.int64))
    reshape = ir.node("Reshape", [weight, sizes])
    result = reshape.outputs[0]
    result.name, result.shape, result.type = names.new(f"{weight.name}_again"), weight.shape, weight.type
    graph.insert_before(before, reshape)
    return result
