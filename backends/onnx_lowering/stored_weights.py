"""Store integer weights the way round they are used, so that runtimes see DequantizeLinear beside its operator.

Given:   w: int8 (out, in) stored;  y = MatMul(x, Transpose(DequantizeLinear(w, scale, axis=0)))
Result:  w': int8 (in, out) stored; y = MatMul(x, DequantizeLinear(w', scale, axis=1))

Reshape and Squeeze of a stored weight (a 1x1 convolution used as a matrix) likewise, where one axis still carries
the scales. Left alone: weights that are computed or graph inputs, scales for blocks. The old weight stays for others.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.backends.onnx_lowering.values import store, value_names
from graphopt.ir.names import Names

_RESHAPES = ("Reshape", "Squeeze", "Unsqueeze", "Flatten")


class StoredWeightsPass(ir.passes.InPlacePass):
    """Move Transpose and Reshape of dequantized stored weights into the stored integers."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the main graph, from its inputs on."""
        modified = False
        names = value_names(model)
        for node in list(model.graph):
            modified |= _move(model.graph, node, names)
        return ir.passes.PassResult(model, modified=modified)


def _move(graph: ir.Graph, node: ir.Node, names: Names) -> bool:
    if node.domain != "" or (node.op_type != "Transpose" and node.op_type not in _RESHAPES):
        return False
    dequantize = node.inputs[0].producer() if node.inputs[0] is not None else None
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or "block_size" in dequantize.attributes:
        return False
    weight = dequantize.inputs[0]
    if weight is None or not weight.is_initializer() or weight.is_graph_input() or weight.const_value is None:
        return False
    if any(producer is not None for producer in (value.producer() for value in dequantize.inputs if value)):
        return False
    stored = weight.const_value.numpy()
    moved = _moved(node, stored, _axis(dequantize))
    if moved is None:
        return False
    values, axis = moved
    own = store(graph, names.new(f"{node.outputs[0].name}_stored"), values, weight.dtype)
    _replace(graph, node, dequantize, own, axis)
    return True


def _axis(dequantize: ir.Node) -> int | None:
    """Return the axis the scales vary along, None for one scale."""
    scale = dequantize.inputs[1]
    assert scale is not None  # DequantizeLinear requires it
    if scale.shape is None or len(scale.shape) == 0:
        return None
    attribute = dequantize.attributes.get("axis")
    return attribute.as_int() if attribute is not None else 1


def _moved(node: ir.Node, stored: np.ndarray, axis: int | None) -> tuple[np.ndarray, int | None] | None:
    """Return the rearranged integers and the axis their scales vary along, None where no axis carries them."""
    if node.op_type == "Transpose":
        attribute = node.attributes.get("perm")
        order = list(attribute.as_ints()) if attribute is not None else list(reversed(range(stored.ndim)))
        return np.transpose(stored, order), None if axis is None else order.index(axis % stored.ndim)
    shape = node.outputs[0].shape
    if shape is None or not shape.is_static():
        return None
    sizes = [int(size) for size in shape.numpy()]
    if axis is None:
        return stored.reshape(sizes), None
    axis %= stored.ndim
    before = int(np.prod(stored.shape[:axis], dtype=np.int64))
    for index, size in enumerate(sizes):
        if size == stored.shape[axis] and int(np.prod(sizes[:index], dtype=np.int64)) == before:
            return stored.reshape(sizes), index
    return None


def _replace(graph: ir.Graph, node: ir.Node, dequantize: ir.Node, weight: ir.Value, axis: int | None) -> None:
    again = ir.node(
        "DequantizeLinear",
        [weight, *dequantize.inputs[1:]],
        {"axis": 1 if axis is None else axis},
        metadata_props=dict(dequantize.metadata_props),
    )
    ir.convenience.replace_nodes_and_values(graph, node, [node], [again], [node.outputs[0]], [again.outputs[0]])
