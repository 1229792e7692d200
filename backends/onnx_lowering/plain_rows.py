"""Packed integers and scales of blocks in plain ONNX, wherever no kernel of the runtime takes them.

Unpack(w)                        w >> (0, bits, ..) & mask, in a row, the first `size`, + low
DequantizeBlocks(q, s, z)        (q - z) * s, where s and z are gathered for each place along the axis
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from graphopt.backends.onnx_lowering.packed_operators import DOMAIN
from graphopt.backends.onnx_lowering.values import store, value_names
from graphopt.ir.names import Names


class PlainRowsPass(ir.passes.InPlacePass):
    """Write what is left of graphopt's own operators as arithmetic."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every graph."""
        names = value_names(model)
        found = [node for node in model.graph.all_nodes() if node.domain == DOMAIN]
        for node in found:
            _Arithmetic(node, names).write()
        return ir.passes.PassResult(model, modified=bool(found))


class _Arithmetic:
    def __init__(self, node: ir.Node, names: Names) -> None:
        assert node.graph is not None  # it is part of the model
        self._node = node
        self._graph = node.graph
        self._names = names
        self._added: list[ir.Node] = []

    def write(self) -> None:
        """Put the arithmetic in the place of the node."""
        rules: dict[str, Callable[[], ir.Value]] = {"Unpack": self._unpack, "DequantizeBlocks": self._dequantize}
        result = rules[self._node.op_type]()
        old = self._node.outputs[0]
        result.shape, result.type = old.shape, old.type
        ir.convenience.replace_nodes_and_values(self._graph, self._node, [self._node], self._added, [old], [result])

    def _unpack(self) -> ir.Value:
        packed = self._node.inputs[0]
        size, bits, low = (self._node.attributes[name].as_int() for name in ("size", "bits", "low"))
        rank = len(packed.shape)  # type: ignore[union-attr, arg-type]
        column = self._call("Unsqueeze", packed, self._put(np.array([-1])))
        shifted = self._call("BitShift", column, self._put(np.arange(0, 8, bits, dtype=np.uint8)), direction="RIGHT")
        codes = self._call("BitwiseAnd", shifted, self._put(np.array((1 << bits) - 1, dtype=np.uint8)))
        rows = self._call("Reshape", codes, self._put(np.array([*[0] * (rank - 1), -1])))
        cut = [self._put(np.array([number])) for number in (0, size, -1)]
        first = self._call("Slice", rows, *cut)
        if low == 0:
            return first
        wide = self._call("Cast", first, to=ir.DataType.INT8)
        return self._call("Add", wide, self._put(np.array(low, dtype=np.int8)))

    def _dequantize(self) -> ir.Value:
        integers, scale, zero_point = self._node.inputs
        assert integers is not None  # by its schema
        assert integers.shape is not None  # the exporter knows it
        assert scale is not None
        axis, block = (self._node.attributes[name].as_int() for name in ("axis", "block"))
        size = integers.shape[axis]
        assert isinstance(size, int)  # rows are stored
        places = self._put(np.arange(size) // block)
        zero = zero_point
        if zero_point is not None and len(zero_point.shape or ()) > 0:
            zero = self._call("Gather", zero_point, places, axis=axis)
        dtype = scale.dtype or ir.DataType.FLOAT
        centred = self._call("Sub", self._call("Cast", integers, to=dtype), self._call("Cast", zero, to=dtype))
        return self._call("Mul", centred, self._call("Gather", scale, places, axis=axis))

    def _call(self, operator: str, *inputs: ir.Value | None, **attributes: int | str) -> ir.Value:
        node = ir.node(operator, list(inputs), attributes, metadata_props=dict(self._node.metadata_props))
        self._added.append(node)
        return node.outputs[0]

    def _put(self, values: np.ndarray) -> ir.Value:
        return store(self._graph, self._names.new(f"{self._node.outputs[0].name}_places"), values)
