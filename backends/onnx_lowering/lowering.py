"""Lower a program to an ONNX model: export, then a straight list of rewrites."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common

from graphopt.backends.onnx_lowering.branch_outputs import BranchOutputsPass
from graphopt.backends.onnx_lowering.channel_rows import ChannelRowsPass
from graphopt.backends.onnx_lowering.duplicates import DuplicateInitializersPass
from graphopt.backends.onnx_lowering.exporter import export, failing_line
from graphopt.backends.onnx_lowering.global_pooling import GlobalPoolingPass
from graphopt.backends.onnx_lowering.integer_relu import IntegerReluPass
from graphopt.backends.onnx_lowering.metadata import StripMetadataPass
from graphopt.backends.onnx_lowering.no_ops import NoOpsPass
from graphopt.backends.onnx_lowering.own_weights import OwnWeightsPass
from graphopt.backends.onnx_lowering.own_zero_points import OwnZeroPointsPass
from graphopt.backends.onnx_lowering.plain_rows import PlainRowsPass
from graphopt.backends.onnx_lowering.saturation import SaturatedClampPass
from graphopt.backends.onnx_lowering.signature import apply_signature
from graphopt.backends.onnx_lowering.stored_bytes import StoredBytesPass
from graphopt.backends.onnx_lowering.stored_weights import StoredWeightsPass
from graphopt.errors import LoweringError, foreign_code
from graphopt.ir.graph import arguments
from graphopt.ir.program import Program
from graphopt.ir.regions import graph_modules
from graphopt.quantization.ops import DEQUANTIZE

_BLOCKS = 21  # the opset whose DequantizeLinear has blocks


@dataclass(frozen=True, slots=True)
class Style:
    """How a runtime wants its ONNX.

    Attributes:
        opset: the opset to emit.
        global_pooling: whether spatial means become GlobalAveragePool.
        channel_rows: whether what is done to each of a few channels is done to rows of them.
        integer_relu: whether Relu between integers becomes an operator with an integer kernel.
        own_weights: whether operators may not share stored weights and their zero points.
        kernels: rewrites to operators of the runtime's own, of what has plain arithmetic otherwise.
    """

    opset: int
    global_pooling: bool = False
    channel_rows: bool = False
    integer_relu: bool = False
    own_weights: bool = False
    kernels: tuple[type[ir.passes.InPlacePass], ...] = ()


def lower(program: Program, style: Style) -> ir.Model:
    """Return `program` as an ONNX model with the program's input and output names and dynamic axes.

    Raises:
        LoweringError: an operator has no ONNX form, or something else went wrong.
    """
    with foreign_code(lambda said, err: _not_lowered(said, failing_line(err, program.graph))):
        return _lowered(program, style)


def _not_lowered(said: str, where: str) -> LoweringError:
    return LoweringError(f"The program cannot be lowered{where}: {said}. Please report the model.")


def _lowered(program: Program, style: Style) -> ir.Model:
    model = export(program, max(style.opset, _BLOCKS) if _has_blocks(program) else style.opset)
    passes: list[ir.passes.PassBase] = [
        StripMetadataPass(),
        StoredBytesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        *(kernel() for kernel in style.kernels),
        PlainRowsPass(),
        StoredWeightsPass(),
        *([IntegerReluPass()] if style.integer_relu else []),
        SaturatedClampPass(),
        *([GlobalPoolingPass()] if style.global_pooling else []),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        NoOpsPass(),
        common.IdentityEliminationPass(),
        *([ChannelRowsPass()] if style.channel_rows else []),
        BranchOutputsPass(),  # the step before takes identities that end a branch
        DuplicateInitializersPass(),
        *([OwnZeroPointsPass(), OwnWeightsPass()] if style.own_weights else []),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
        common.TopologicalSortPass(),
    ]
    for step in passes:
        step(model)
    apply_signature(model, program.inputs, program.outputs)
    return model


def _has_blocks(program: Program) -> bool:
    bodies = graph_modules(program.graph_module)
    calls = (node for body in bodies for node in body.graph.nodes if node.target is DEQUANTIZE)
    return any(arguments(node, ())["block"] is not None for node in calls)
