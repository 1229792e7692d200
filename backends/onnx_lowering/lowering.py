"""Lower a program to an ONNX model: export, then a straight list of rewrites."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common

from graphopt.backends.onnx_lowering.branch_outputs import BranchOutputsPass
from graphopt.backends.onnx_lowering.duplicates import DuplicateInitializersPass
from graphopt.backends.onnx_lowering.exporter import export
from graphopt.backends.onnx_lowering.global_pooling import GlobalPoolingPass
from graphopt.backends.onnx_lowering.metadata import StripMetadataPass
from graphopt.backends.onnx_lowering.own_weights import OwnWeightsPass
from graphopt.backends.onnx_lowering.saturation import SaturatedClampPass
from graphopt.backends.onnx_lowering.signature import apply_signature
from graphopt.backends.onnx_lowering.stored_weights import StoredWeightsPass
from graphopt.ir.program import Program


@dataclass(frozen=True, slots=True)
class Style:
    """How a runtime wants its ONNX.

    Attributes:
        opset: the opset to emit.
        global_pooling: whether spatial means become GlobalAveragePool.
        own_weights: whether operators may not share stored weights and their zero points.
    """

    opset: int
    global_pooling: bool = False
    own_weights: bool = False


def lower(program: Program, style: Style) -> ir.Model:
    """Return `program` as an ONNX model with the program's input and output names and dynamic axes.

    Raises:
        LoweringError: an operator has no ONNX form.
    """
    model = export(program, style.opset)
    passes: list[ir.passes.PassBase] = [
        StripMetadataPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        StoredWeightsPass(),
        SaturatedClampPass(),
        *([GlobalPoolingPass()] if style.global_pooling else []),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.IdentityEliminationPass(),
        BranchOutputsPass(),  # the step before takes identities that end a branch
        DuplicateInitializersPass(),
        *([OwnWeightsPass()] if style.own_weights else []),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
        common.TopologicalSortPass(),
    ]
    for step in passes:
        step(model)
    apply_signature(model, program.inputs, program.outputs)
    return model
