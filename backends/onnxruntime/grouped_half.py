"""Convolutions of groups in float16, computed in float32: on ARM the runtime has a kernel of its own for float16.

Given:   Conv(x, w, b)                               float16, channels in groups of more than one
Result:  Cast(Conv(Cast(x), Cast(w), Cast(b)))

That kernel is off by a multiple of the largest value, and does not give the same twice (1.31.1, of any rank); without
groups, and with a group for each channel, it is right. Elsewhere the runtime has none, and converts likewise itself.
`tools/check_arm.py` found it.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.backends.onnx_lowering.values import value_names
from graphopt.ir.names import Names


def widen_grouped_convolutions(model: ir.Model) -> None:
    """Rewrite every graph."""
    names = value_names(model)
    for graph in model.graphs():
        for node in [node for node in graph if node.domain == "" and node.op_type == "Conv"]:
            if node.attributes.get_int("group", 1) > 1 and _is_half(node.inputs[1]) and not _is_depthwise(node):
                _widen(graph, node, names)


def _is_half(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT16


def _is_depthwise(node: ir.Node) -> bool:
    """Whether every channel makes one of its own."""
    shape = node.inputs[1].shape if node.inputs[1] is not None else None  # (out, in/groups, *kernel)
    return shape is not None and shape[0] == node.attributes.get_int("group", 1) and shape[1] == 1


def _widen(graph: ir.Graph, node: ir.Node, names: Names) -> None:
    result = node.outputs[0]
    added: list[ir.Node] = []

    def call(
        operator: str, *inputs: ir.Value | None, dtype: ir.DataType, like: ir.Value, **attributes: int
    ) -> ir.Value:
        made = ir.node(operator, inputs, attributes, metadata_props=dict(node.metadata_props))
        value = made.outputs[0]
        value.name, value.shape, value.type = names.new(f"{like.name}_wide"), like.shape, ir.TensorType(dtype)
        added.append(made)
        return value

    def cast(value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return call("Cast", value, dtype=dtype, like=value, to=int(dtype))

    wide = [value and cast(value, ir.DataType.FLOAT) for value in node.inputs]
    product = call("Conv", *wide, dtype=ir.DataType.FLOAT, like=result)
    added[-1].attributes.update(node.attributes)
    last = cast(product, ir.DataType.FLOAT16)
    ir.convenience.replace_nodes_and_values(graph, node, [node], added, [result], [last])
