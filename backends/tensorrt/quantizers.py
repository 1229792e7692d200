"""QuantizeLinear and DequantizeLinear nodes, read into plain facts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

WIDE_TYPES = (ir.DataType.INT16, ir.DataType.UINT16)
_NODES = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True, eq=False)
class Quantizer:
    """One QuantizeLinear or DequantizeLinear.

    Attributes:
        node: the node.
        dtype: type of its integers.
        scale: its scales, None if they are computed.
        zero_point: its zero points, None if there are none or they are computed.
        axis: the axis scales differ along, not negative where the rank is known.
        rank: rank of the value, -1 if unknown.
        of_constant: whether the value comes from stored tensors alone.
    """

    node: ir.Node
    dtype: ir.DataType
    scale: np.ndarray | None
    zero_point: np.ndarray | None
    axis: int
    rank: int
    of_constant: bool

    @property
    def in_blocks(self) -> bool:
        """Whether several values along the axis share a scale."""
        return "block_size" in self.node.attributes

    @property
    def per_channel(self) -> bool:
        """Whether there is more than one scale."""
        return self.scale is not None and self.scale.size > 1


def quantizers(model: ir.Model) -> Iterator[Quantizer]:
    """Yield every quantizer and dequantizer of a model."""
    for node in model.graph.all_nodes():
        if node.op_type in _NODES:
            yield _read(node)


def dequantizer_of(value: ir.Value | None) -> Quantizer | None:
    """Return the DequantizeLinear that makes a value, None if something else does."""
    node = value.producer() if value is not None else None
    return _read(node) if node is not None and node.op_type == "DequantizeLinear" else None


def readers(value: ir.Value, operator: str) -> Iterator[ir.Node]:
    """Yield the nodes of one kind that read a value."""
    for use in value.uses():
        if use.node.op_type == operator:
            yield use.node


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is stored, or computed from stored values by quantizers alone."""
    if value is None:
        return False
    if value.is_graph_input():
        return False
    node = value.producer()
    if node is None:
        return value.const_value is not None
    return node.op_type == "Constant" or (node.op_type in _NODES and is_constant(node.inputs[0]))


def _read(node: ir.Node) -> Quantizer:
    x, scale, zero_point = [*node.inputs, None, None][:3]
    zeros = _constant(zero_point)
    axis = node.attributes.get("axis")
    rank = len(x.shape) if x is not None and x.shape is not None else -1
    along = axis.as_int() if axis is not None else 1
    return Quantizer(
        node=node,
        dtype=_integer_type(node, x, zero_point),
        scale=_constant(scale),
        zero_point=zeros,
        axis=along % rank if rank > 0 else along,
        rank=rank,
        of_constant=is_constant(x),
    )


def _integer_type(node: ir.Node, x: ir.Value | None, zero_point: ir.Value | None) -> ir.DataType:
    """Return the type of the integers: the zero point's, or what the operator says without one."""
    stored = x.dtype if node.op_type == "DequantizeLinear" and x is not None else node.outputs[0].dtype
    if zero_point is not None and zero_point.dtype is not None:
        return zero_point.dtype
    return stored or ir.DataType.UINT8


def _constant(value: ir.Value | None) -> np.ndarray | None:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()
