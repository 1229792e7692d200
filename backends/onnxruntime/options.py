"""Session options an artifact is recorded with: what makes this graph fast in ONNX Runtime 1.31 on a CPU."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.backends.onnx_execution.session import PRECISE, ROUNDED_AS_WRITTEN
from graphopt.backends.onnx_lowering.own_weights import stored_integers
from graphopt.ir.plain_data import Json

# Both cost more than what they fuse: 0.49 ms a layer against 0.08 for Add and LayerNormalization, 0.42 against 0.25
# for Add and Gelu (BERT-base, sequence 128, one thread).
_SLOWER_FUSIONS = ("BiasGeluFusion", "SkipLayerNormFusion")
# Turns a quantized MatMul and its bias into a float Gemm before the integer kernels are chosen.
_INTEGER_BREAKER = "MatMulAddFusion"

_LARGEST = (2**15 - 1) // (2 * 255)


def recorded_options(model: ir.Model) -> dict[str, Json]:
    """Return session options as plain data, for `Artifact.session_options`."""
    disabled: list[Json] = []
    nodes = list(model.graph.all_nodes())
    if any(node.op_type == "LayerNormalization" for node in nodes):
        disabled += _SLOWER_FUSIONS
    if any(_loses_its_integers(node) for node in nodes):
        disabled.append(_INTEGER_BREAKER)
    options: dict[str, Json] = {
        "threads": 0,
        "optimization": "all",
        "spinning": False,
        "disabled_optimizers": disabled,
    }
    if any(node.op_type == "DynamicQuantizeLinear" for node in nodes):
        options["config"] = dict(ROUNDED_AS_WRITTEN)
    if any(_saturates(value) for node in nodes for value in stored_integers(node)):
        options["where_products_saturate"] = dict(PRECISE)
    return options


def _saturates(weight: ir.Value) -> bool:
    """Whether two products of a weight and 255 may exceed 16 bits, which x86 without VNNI adds them up in."""
    if weight.const_value is None:
        return True
    values = weight.const_value.numpy()
    return bool(values.size) and max(int(values.max()), -int(values.min())) > _LARGEST


def _loses_its_integers(node: ir.Node) -> bool:
    """Whether a product of integers is followed by a bias and of a shape that MatMulAddFusion takes."""
    if node.op_type != "MatMul" or not all(_dequantized(value) for value in node.inputs):
        return False
    result = node.outputs[0]
    if not any(use.node.op_type == "Add" for use in result.uses()):
        return False
    return result.shape is not None and (len(result.shape) == 2 or result.shape.is_static())


def _dequantized(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"
