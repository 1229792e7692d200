"""The ONNX Runtime backend: programs become ONNX files whose integer layers reach the CPU's integer kernels."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
import torch

from graphopt.backends.onnx_backend import OnnxBackend
from graphopt.backends.onnx_execution.operator_times import operator_times
from graphopt.backends.onnx_execution.saturating_products import products_saturate
from graphopt.backends.onnx_execution.session import OnnxSession, SessionSettings
from graphopt.backends.onnx_lowering.lowering import Style
from graphopt.backends.onnx_lowering.saving import EXTERNAL_DATA_ABOVE
from graphopt.backends.onnx_lowering.simplification import simplify_where_smaller
from graphopt.backends.onnxruntime.block_kernels import BlockKernelsPass
from graphopt.backends.onnxruntime.breakers import keep_apart
from graphopt.backends.onnxruntime.description import DESCRIPTION, DESCRIPTION_ARM, DESCRIPTION_AVX2
from graphopt.backends.onnxruntime.fusion import Layer, quantized_layers
from graphopt.backends.onnxruntime.grouped_half import widen_grouped_convolutions
from graphopt.backends.onnxruntime.integer_products import write_integer_products
from graphopt.backends.onnxruntime.options import recorded_options
from graphopt.backends.onnxruntime.prelu import take_prelu_apart
from graphopt.errors import LoweringError
from graphopt.ir.plain_data import Json
from graphopt.ir.program import Program
from graphopt.ir.regions import graph_modules
from graphopt.ir.torch_internals import pytree
from graphopt.measure.processor import X86, said_of_processor
from graphopt.targets.backend import Array, Artifact, Finding, OperatorTime
from graphopt.targets.description import TargetDescription


class OnnxRuntimeBackend(OnnxBackend):
    """Lowers to ONNX for ONNX Runtime's CPU execution provider."""

    name: ClassVar[str] = "onnxruntime"
    style: ClassVar[Style] = Style(
        opset=DESCRIPTION.opset,
        global_pooling=True,
        channel_rows=True,
        integer_relu=True,
        own_weights=True,
        kernels=(BlockKernelsPass,),
    )

    def __init__(self, *, simplify: bool = False, external_data_above: int = EXTERNAL_DATA_ABOVE) -> None:
        """Prepare to lower.

        Args:
            simplify: clean up with onnxsim (extra `graphopt[onnxsim]`); its result is kept only if it is smaller and
                agrees.
            external_data_above: bytes of weights from which on they are stored beside the model.
        """
        super().__init__(external_data_above=external_data_above)
        self._simplify = simplify

    @property
    def description(self) -> TargetDescription:
        """What passes need to know about the runtime."""
        return DESCRIPTION

    def options(self, model: ir.Model) -> dict[str, Json]:
        """Return the options that make the model fast, see `onnxruntime.options`."""
        return recorded_options(model)

    def prepare(self, model: ir.Model, program: Program) -> tuple[ir.Model, dict[str, Json]]:
        """Write what the runtime is slow at or gets wrong another way, and clean up where that was asked for."""
        take_prelu_apart(model)
        keep_apart(model)
        widen_grouped_convolutions(model)
        write_integer_products(model)
        if not self._simplify:
            return model, {}
        model, said = simplify_where_smaller(model, program)
        return model, {"onnxsim": said}

    def accept(self, path: Path, model: ir.Model, program: Program) -> dict[str, Json]:
        """Load the file and count the quantized operators that reach an integer kernel.

        Raises:
            LoweringError: ONNX Runtime has no kernel for an operator.
        """
        settings = SessionSettings.of(self.options(model))
        try:
            layers = quantized_layers(path, settings)
            if not layers:
                OnnxSession(path, settings)
        except LoweringError as err:
            if _computes_in(torch.bfloat16, program):
                raise LoweringError(
                    "ONNX Runtime has no bfloat16 kernels for some operators of the model. Convert it with "
                    f"`model.float()`, and leave out torch.autocast. The runtime says: {err}"
                ) from err
            if _computes_in(torch.float64, program):
                raise LoweringError(f"{err} Parts are in double precision: convert them with `model.float()`.") from err
            raise
        return {"quantized": len(layers), "integer": sum(layer.integer for layer in layers)}

    def check(self, artifact: Artifact) -> list[Finding]:
        """Report layers that were quantized and run in float after all."""
        if "quantized" in artifact.facts and artifact.facts["quantized"] == artifact.facts["integer"]:
            return []  # they were counted when it was lowered
        return [
            Finding("warning", layer.name, _complaint(layer))
            for layer in self.integer_operators(artifact)
            if not layer.integer
        ]

    def advice(self, artifact: Artifact) -> list[str]:
        """Say which target is faster or more exact on a processor like this one, where products are integers."""
        costs = self.description.costs
        if costs is not None and platform.machine() not in X86:
            said = f"what is faster as float is told by costs of {costs.processor}, and this is {platform.machine()}"
            remedy = (
                f"--target {DESCRIPTION_ARM.name.replace('-', ':', 1)} goes by none, int8:guard=measure times it here"
            )
            return [f"{said}: {remedy}"] if artifact.facts.get("quantized") else []
        if "avx2" not in " ".join(said_of_processor("flags")).split():
            return []
        narrow = self.name == DESCRIPTION_AVX2.name
        if narrow == products_saturate() or not (narrow or "where_products_saturate" in artifact.session_options):
            return []
        if narrow:
            return [f"this processor has VNNI: --target {DESCRIPTION.name} is as fast on it, with weights of 8 bits"]
        return [
            "this processor has no VNNI, and products of 8-bit weights are slow on it: to deploy on one like it, take "
            "--target onnxruntime:x86-avx2 (weights of 7 bits)"
        ]

    def integer_operators(self, artifact: Artifact) -> list[Layer]:
        """List the quantized operators of an artifact with the kernel each reaches."""
        return quantized_layers(artifact.path, SessionSettings.of(artifact.session_options))

    def operator_times(self, artifact: Artifact, inputs: Sequence[Array]) -> list[OperatorTime]:
        """Run it with one thread and say what each operator of the optimized graph takes."""
        return operator_times(artifact.path, SessionSettings.of(artifact.session_options), inputs)

    def summary(self, artifact: Artifact) -> str:
        """Say how many of the quantized operators run on integers."""
        quantized = artifact.facts.get("quantized", 0)
        if not quantized:
            return f"{artifact.facts.get('operators', 0)} operators, float"
        return f"{artifact.facts['integer']} of {quantized} quantized operators on integer kernels"


class OnnxRuntimeAvx2Backend(OnnxRuntimeBackend):
    """Lowers for x86 without VNNI (AVX2, AVX-512 before it), where products of 8-bit integers saturate or are slow."""

    name: ClassVar[str] = DESCRIPTION_AVX2.name

    @property
    def description(self) -> TargetDescription:
        """What passes need to know about the runtime on such processors."""
        return DESCRIPTION_AVX2


class OnnxRuntimeArmBackend(OnnxRuntimeBackend):
    """Lowers for 64-bit ARM, where nothing was timed: what is faster as float is told by timing there alone."""

    name: ClassVar[str] = DESCRIPTION_ARM.name
    times_here: ClassVar[bool] = platform.machine() not in X86

    @property
    def description(self) -> TargetDescription:
        """What passes need to know about the runtime on such processors."""
        return DESCRIPTION_ARM

    def advice(self, artifact: Artifact) -> list[str]:
        """Say that times on this machine are not those of the target, where it is another."""
        if self.times_here or not artifact.facts.get("quantized"):
            return []
        return ["it is not timed: this machine is no ARM, and its times say nothing of one"]


def _computes_in(dtype: torch.dtype, program: Program) -> bool:
    """Whether a value is of a type, in the regions of autocast too."""
    values = [node.meta.get("val") for body in graph_modules(program.graph_module) for node in body.graph.nodes]
    return any(isinstance(leaf, torch.Tensor) and leaf.dtype is dtype for leaf in pytree.tree_leaves(values))


def _complaint(layer: Layer) -> str:
    reason = f": {layer.reason}" if layer.reason else ""
    return f"{layer.operator} is quantized, but ONNX Runtime runs it in float{reason}."
