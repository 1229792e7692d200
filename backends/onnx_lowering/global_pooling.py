"""The mean over all spatial axes as GlobalAveragePool, which has an integer kernel where ReduceMean has none.

Given:   ReduceMean(x, axes=[2, 3], keepdims=1)       x: (batch, channels, height, width)
Result:  GlobalAveragePool(x)

Given:   ReduceMean(x, axes=[2, 3], keepdims=0)
Result:  Squeeze(GlobalAveragePool(x), axes=[2, 3])

Left alone: other axes, axes that are computed, unknown rank, rank below 3, numbers GlobalAveragePool does not take.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

_FLOATING = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16)


class GlobalPoolingPass(ir.passes.InPlacePass):
    """Rewrite spatial means of every graph in the model."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite; `modified` says whether there was one."""
        matches = [node for node in model.graph.all_nodes() if _is_spatial_mean(node)]
        for node in matches:
            _rewrite(node)
        return ir.passes.PassResult(model, modified=bool(matches))


def _is_spatial_mean(node: ir.Node) -> bool:
    if node.op_type != "ReduceMean" or node.domain != "" or node.inputs[0] is None:
        return False
    x = node.inputs[0]
    if x.shape is None or x.dtype not in _FLOATING or len(x.shape) < 3:
        return False
    axes = _axes(node)
    rank = len(x.shape)
    return axes is not None and sorted(axis % rank for axis in axes) == list(range(2, rank))


def _axes(node: ir.Node) -> list[int] | None:
    """Return the constant axes, None if there are none or they are computed. An input since opset 18."""
    if len(node.inputs) < 2 or node.inputs[1] is None:
        attribute = node.attributes.get("axes")
        return list(attribute.as_ints()) if attribute is not None else None
    constant = ir.convenience.get_const_tensor(node.inputs[1])
    return None if constant is None else [int(axis) for axis in constant.numpy().reshape(-1)]


def _rewrite(node: ir.Node) -> None:
    x, result = node.inputs[0], node.outputs[0]
    assert x is not None  # matched
    assert x.shape is not None  # matched
    assert node.graph is not None  # it is part of the model
    rank = len(x.shape)
    keeps = node.attributes.get("keepdims")
    pooled = ir.node("GlobalAveragePool", [x], metadata_props=dict(node.metadata_props))
    pooled.outputs[0].type = x.type
    pooled.outputs[0].shape = ir.Shape([*x.shape.dims[:2], *[1] * (rank - 2)])
    added = [pooled]
    if keeps is not None and keeps.as_int() == 0:
        axes = ir.node("Constant", [], {"value": ir.tensor(np.arange(2, rank, dtype=np.int64))})
        squeezed = ir.node("Squeeze", [pooled.outputs[0], axes.outputs[0]], metadata_props=dict(node.metadata_props))
        added += [axes, squeezed]
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], added, [result], [added[-1].outputs[0]])
