"""Stored rows of integers as DequantizeLinear with blocks, which TensorRT reads next to a product.

Given:   DequantizeBlocks([Unpack](w), scale, middle) {block}          w: bytes, several integers in each
Result:  DequantizeLinear(w', scale) {axis 1, block_size}              w': int4 or int8, zero point 0
         DequantizeLinear(w', scale) {axis 0}                          where a block is a whole row

Left alone: other zero points, other numbers of bits, rows that are chosen, a last block that is shorter.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.backends.onnx_lowering.stored_rows import StoredRows, array, stored_rows
from graphopt.backends.onnx_lowering.values import store, value_names
from graphopt.ir.names import Names

_TYPES = {4: ir.DataType.INT4, 8: ir.DataType.INT8}


class BlockWeightsPass(ir.passes.InPlacePass):
    """Store rows the way TensorRT reads them."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every graph."""
        modified = False
        names = value_names(model)
        for graph in model.graphs():
            known: dict[ir.Value, ir.Value] = {}
            for node in list(graph):
                rows = stored_rows(node)
                if rows is not None and _fits(rows):
                    _write(graph, node, rows, known, names)
                    modified = True
        return ir.passes.PassResult(model, modified=modified)


def _fits(rows: StoredRows) -> bool:
    known = rows.bits in _TYPES and rows.zero_point is None and rows.indices is None
    return known and rows.columns % rows.block == 0


def _write(graph: ir.Graph, node: ir.Node, rows: StoredRows, known: dict[ir.Value, ir.Value], names: Names) -> None:
    if rows.integers not in known:
        dtype = _TYPES[rows.bits]
        values = _signed(rows).astype(dtype.numpy())
        known[rows.integers] = store(graph, names.new(f"{rows.integers.name}_{dtype.name.lower()}"), values, dtype)
    scale, attributes = rows.scale, {"axis": 1, "block_size": rows.block}
    if rows.block == rows.columns:
        scale, attributes = store(graph, names.new(f"{scale.name}_row"), array(scale)[:, 0]), {"axis": 0}
    new = ir.node(
        "DequantizeLinear", [known[rows.integers], scale], attributes, metadata_props=dict(node.metadata_props)
    )
    new.outputs[0].shape, new.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
    ir.convenience.replace_nodes_and_values(graph, node, [node], [new], [node.outputs[0]], [new.outputs[0]])


def _signed(rows: StoredRows) -> np.ndarray:
    """Return the integers around 0, (rows, columns) int8."""
    codes = rows.unsigned(rows.integers)
    shifts = np.arange(0, 8, rows.bits, dtype=np.uint8)
    apart = (codes[..., None] >> shifts) & np.uint8((1 << rows.bits) - 1)
    middle = 1 << rows.bits - 1
    return (apart.reshape(rows.rows, -1)[:, : rows.columns].astype(np.int16) - middle).astype(np.int8)
