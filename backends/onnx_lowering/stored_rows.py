"""Stored matrices of integers with scales for blocks of their rows, however reading them is spelled.

    DequantizeBlocks([Unpack](w), scale, [Unpack](zero_point)) {axis: last}

w, scale and zero_point are stored, or each is a Gather of stored rows by the same indices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.backends.onnx_lowering.packed_operators import DOMAIN


@dataclass(frozen=True, eq=False)
class StoredRows:
    """A matrix (rows, columns) of stored integers.

    Attributes:
        integers: the initializer, (rows, bytes) where it is packed, else (rows, columns).
        columns: integers of a row.
        bits: of an integer.
        low: the integer that is stored as bits that are 0; -128 of int8.
        scale: the initializer of scales, (rows, blocks) float32.
        zero_point: the initializer of zero points, stored like the integers; None where all are the middle.
        block: consecutive columns that share a scale.
        indices: the rows that are read, None for all in order.
    """

    integers: ir.Value
    columns: int
    bits: int
    low: int
    scale: ir.Value
    zero_point: ir.Value | None
    block: int
    indices: ir.Value | None

    @property
    def rows(self) -> int:
        """Number of rows stored."""
        return len(array(self.integers))

    def unsigned(self, value: ir.Value) -> np.ndarray:
        """Return integers or zero points as those of a range that starts at 0, packed as they are."""
        stored = array(value)
        return (stored.astype(np.int16) - self.low).astype(np.uint8) if stored.dtype == np.int8 else stored


def array(value: ir.Value) -> np.ndarray:
    """Return what an initializer holds."""
    assert value.const_value is not None  # it is stored
    return value.const_value.numpy()


def stored_rows(node: ir.Node) -> StoredRows | None:
    """Read what a node dequantizes, None if it is no matrix of stored integers with a scale per block of a row."""
    if (node.domain, node.op_type) != (DOMAIN, "DequantizeBlocks"):
        return None
    integers, size, bits, low = _unpacked(node.inputs[0])
    integers, indices = _gathered(integers)
    scale, of_scale = _gathered(node.inputs[1])
    if integers is None or scale is None or of_scale is not indices or scale.dtype != ir.DataType.FLOAT:
        return None
    if array(integers).ndim != 2 or node.attributes["axis"].as_int() not in (-1, _rank(node.outputs[0]) - 1):
        return None
    zero_point, understood = _zero_point(node.inputs[2], indices, bits, low)
    if not understood:
        return None
    columns = array(integers).shape[1] if size is None else size
    block = min(node.attributes["block"].as_int(), columns)
    return StoredRows(integers, columns, bits, low, scale, zero_point, block, indices)


def _zero_point(source: ir.Value | None, indices: ir.Value | None, bits: int, low: int) -> tuple[ir.Value | None, bool]:
    """Return the zero points, None where all are the middle of the range, and whether they are understood."""
    stored, size, *spelling = _unpacked(source)
    stored, of_zero = _gathered(stored)
    if stored is None:
        return None, False
    if size is None and bool(np.all(array(stored) == low + (1 << bits - 1))):
        return None, True
    return stored, spelling == [bits, low] and of_zero is indices and array(stored).ndim == 2


def _unpacked(value: ir.Value | None) -> tuple[ir.Value | None, int | None, int, int]:
    """Return what is unpacked, and size, bits and low of its integers; size is None of what is not packed."""
    node = value.producer() if value is not None else None
    if node is not None and (node.domain, node.op_type) == (DOMAIN, "Unpack"):
        size, bits, low = (node.attributes[name].as_int() for name in ("size", "bits", "low"))
        return node.inputs[0], size, bits, low
    return value, None, 8, -128 if value is not None and value.dtype == ir.DataType.INT8 else 0


def _gathered(value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    """Return the initializer that a value is, or whose rows it is, and which rows; None if it is neither."""
    node = value.producer() if value is not None else None
    indices = None
    if node is not None and (node.domain, node.op_type) == ("", "Gather"):
        axis = node.attributes.get("axis")
        if axis is not None and axis.as_int() != 0:
            return None, None
        value, indices = node.inputs
    stored = value is not None and value.is_initializer() and not value.is_graph_input()
    return (value if stored else None), indices


def _rank(value: ir.Value) -> int:
    return -1 if value.shape is None else len(value.shape)
