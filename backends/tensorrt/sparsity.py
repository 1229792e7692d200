"""Counts layers whose weights suit sparse tensor cores: of every 4 input channels at least 2 are zero.

The rule is TensorRT's own (its documentation, "I/O formats and sparsity"), for each output channel and position of the
kernel. The builder looks for itself where it is allowed to; whether it then picks a sparse kernel shows on a GPU only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.backends.tensorrt.quantizers import is_constant

_LAYERS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True, slots=True)
class SparseLayers:
    """What was found.

    Attributes:
        sparse: layers whose stored weight has the pattern.
        layers: layers with a stored weight that has elements.
    """

    sparse: int
    layers: int


def sparse_layers(model: ir.Model, *, nonzeros: int, group: int) -> SparseLayers:
    """Count the convolutions and matrix products whose weight holds at most `nonzeros` of every `group` inputs."""
    sparse = layers = 0
    for node in model.graph.all_nodes():
        weight = _weight(node)
        if weight is None or not weight.size:
            continue
        layers += 1
        rows = np.moveaxis(weight, _input_axis(node, weight), -1)
        if rows.shape[-1] % group == 0:
            counts = np.count_nonzero(rows.reshape(*rows.shape[:-1], -1, group), axis=-1)
            sparse += bool(counts.max() <= nonzeros)
    return SparseLayers(sparse, layers)


def _weight(node: ir.Node) -> np.ndarray | None:
    """Return the stored weight of a layer, as integers where it is quantized."""
    if node.op_type not in _LAYERS or len(node.inputs) < 2 or not is_constant(node.inputs[1]):
        return None
    value = node.inputs[1]
    while value is not None and (maker := value.producer()) is not None and maker.op_type != "Constant":
        value = maker.inputs[0]  # quantizers alone, as `is_constant` has seen
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()


def _input_axis(node: ir.Node, weight: np.ndarray) -> int:
    if node.op_type == "Conv":
        return 1
    if node.op_type == "Gemm":
        transposed = node.attributes.get("transB")
        return 1 if transposed is not None and transposed.as_int() else 0
    return max(weight.ndim - 2, 0)
