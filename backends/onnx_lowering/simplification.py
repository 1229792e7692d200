"""onnxsim as a guarded clean-up: kept only if it makes the graph smaller and ONNX Runtime still computes the same.

It is known to add nodes to a graph that is optimized already, and it folds the dequantization of stored integer
weights, which undoes quantization, and what is looked up by stored bytes; so models with such weights keep their
constants out of its reach.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from graphopt.backends.onnx_execution.agreement import half_of_the_digits, relative_error
from graphopt.backends.onnx_execution.batches import batches
from graphopt.backends.onnx_execution.session import OnnxSession, SessionSettings
from graphopt.backends.onnx_lowering.saving import MOST_IN_A_MESSAGE, bytes_of_weights
from graphopt.errors import LoweringError
from graphopt.ir.program import Program

_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


def simplify_where_smaller(model: ir.Model, program: Program) -> tuple[ir.Model, str]:
    """Return the simplified model, or `model` itself, and a sentence that says which and why.

    Raises:
        LoweringError: onnxsim is not installed.
    """
    onnxsim = _import()
    if bytes_of_weights(model) > MOST_IN_A_MESSAGE:
        return model, "left out: the model is too large for one protobuf"
    proto = ir.to_proto(model)
    small = any(node.op_type in _QUANTIZERS for node in model.graph) or any(
        value.dtype == ir.DataType.UINT8 for value in model.graph.initializers.values()
    )
    try:
        simplified, _ = onnxsim.simplify(proto, check_n=0, skip_constant_folding=small, certify=False)
    except Exception as err:  # onnxsim is C++ and raises what its passes raise
        return model, f"discarded: it failed ({type(err).__name__})"
    after, before = len(simplified.graph.node), len(proto.graph.node)
    if after >= before or simplified.ByteSize() > proto.ByteSize():
        return (
            model,
            f"discarded: {before} nodes before, {after} after, {simplified.ByteSize() - proto.ByteSize():+} bytes",
        )
    if not _agree(proto.SerializeToString(), simplified.SerializeToString(), program):
        return model, "discarded: it computes something else"
    result = ir.from_proto(simplified)
    result.producer_name, result.producer_version = model.producer_name, model.producer_version
    result.metadata_props.clear()
    return result, f"kept: {before} nodes before, {after} after"


def _import() -> Any:
    try:
        return importlib.import_module("onnxsim")
    except ImportError as err:
        raise LoweringError("Simplification needs onnxsim: pip install 'graphopt[onnxsim]'.") from err


def _agree(before: bytes, after: bytes, program: Program) -> bool:
    """Whether ONNX Runtime computes the same of both, literally (no optimizer of its own)."""
    settings = SessionSettings(optimization="disabled")
    try:
        sessions = [OnnxSession(model, settings) for model in (before, after)]
        if sessions[0].inputs != sessions[1].inputs or sessions[0].outputs != sessions[1].outputs:
            return False
        return all(_equal(*(session(*arrays) for session in sessions)) for _, arrays in batches(program, None))
    except LoweringError:
        return False


def _equal(wanted: Sequence[object], found: Sequence[object]) -> bool:
    for want, got in zip(map(torch.as_tensor, wanted), map(torch.as_tensor, found), strict=True):
        if want.shape != got.shape or want.dtype != got.dtype:
            return False
        if not want.is_floating_point():
            if not torch.equal(want, got):
                return False
        elif relative_error(want, got) > half_of_the_digits(want.dtype):
            return False
    return True
