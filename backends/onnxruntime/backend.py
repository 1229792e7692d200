"""The ONNX Runtime backend: programs become ONNX files whose integer layers reach the CPU's integer kernels."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
import torch

from graphopt.backends.onnx_execution.run_script import run_script
from graphopt.backends.onnx_execution.session import OnnxSession, SessionSettings
from graphopt.backends.onnx_execution.verification import verify
from graphopt.backends.onnx_lowering.artifacts import files_of, read_model, specs
from graphopt.backends.onnx_lowering.lowering import Style, lower
from graphopt.backends.onnx_lowering.saving import EXTERNAL_DATA_ABOVE, save
from graphopt.backends.onnx_lowering.simplification import simplify_where_smaller
from graphopt.backends.onnxruntime.description import DESCRIPTION
from graphopt.backends.onnxruntime.fusion import Layer, quantized_layers
from graphopt.backends.onnxruntime.options import recorded_options
from graphopt.errors import LoweringError
from graphopt.ir.plain_data import Json
from graphopt.ir.program import Program
from graphopt.targets.backend import Array, Artifact, Backend, Finding
from graphopt.targets.description import TargetDescription


class OnnxRuntimeBackend(Backend):
    """Lowers to ONNX for ONNX Runtime's CPU execution provider."""

    name: ClassVar[str] = "onnxruntime"

    def __init__(self, *, simplify: bool = False, external_data_above: int = EXTERNAL_DATA_ABOVE) -> None:
        """Prepare to lower.

        Args:
            simplify: clean up with onnxsim (extra `graphopt[onnxsim]`); its result is kept only if it is smaller and
                agrees.
            external_data_above: bytes of weights from which on they are stored beside the model.
        """
        self._simplify = simplify
        self._external_data_above = external_data_above

    @property
    def description(self) -> TargetDescription:
        """What passes need to know about the runtime."""
        return DESCRIPTION

    def lower(self, program: Program, path: Path) -> Artifact:
        """Write `program` as ONNX.

        Raises:
            LoweringError: an operator has no ONNX form, or ONNX Runtime no kernel for it.
        """
        model = lower(program, Style(opset=DESCRIPTION.opset, global_pooling=True, own_weights=True))
        facts: dict[str, Json] = {}
        if self._simplify:
            model, facts["onnxsim"] = simplify_where_smaller(model, program)
        options = recorded_options(model)
        files = save(model, path, external_data_above=self._external_data_above)
        try:
            layers = quantized_layers(path, SessionSettings.of(options))
            if not layers:
                OnnxSession(path, SessionSettings.of(options))
        except LoweringError as err:
            for file in files:
                file.unlink(missing_ok=True)
            if any(tensor.dtype is torch.bfloat16 for tensor in program.state_dict().values()):
                raise LoweringError(
                    "ONNX Runtime has no bfloat16 kernels for some operators of the model. Convert it with "
                    f"`model.float()` first. The runtime says: {err}"
                ) from err
            raise
        facts["operators"] = _count(model)
        facts["quantized"] = len(layers)
        facts["integer"] = sum(layer.integer for layer in layers)
        return Artifact(path, files, self, program.inputs, program.outputs, options, facts)

    def check(self, artifact: Artifact) -> list[Finding]:
        """Report layers that were quantized and run in float after all."""
        return [
            Finding("warning", layer.name, _complaint(layer))
            for layer in self.integer_operators(artifact)
            if not layer.integer
        ]

    def integer_operators(self, artifact: Artifact) -> list[Layer]:
        """List the quantized operators of an artifact with the kernel each reaches."""
        return quantized_layers(artifact.path, SessionSettings.of(artifact.session_options))

    def verify(self, artifact: Artifact, program: Program, inputs: tuple[Array, ...] | None = None) -> float:
        """Compare the file on disk with `program` on the recorded options; see `onnx_execution.verification`."""
        settings = SessionSettings.of(artifact.session_options)
        return verify(artifact.path, program, inputs, dataclasses.replace(settings, threads=0))

    def session(self, artifact: Artifact, **options: Json) -> OnnxSession:
        """Load the artifact in ONNX Runtime.

        Args:
            artifact: what `lower` or `open` returned.
            options: `threads`, `optimization`, `spinning`, `disabled_optimizers`, `config`; they override recorded
                ones.
        """
        return OnnxSession(artifact.path, SessionSettings.of({**artifact.session_options, **options}))

    def open(self, path: Path) -> Artifact:
        """Describe an ONNX file."""
        path = Path(path)
        model = read_model(path)
        inputs = specs(list(model.graph.inputs), path)
        outputs = specs(list(model.graph.outputs), path)
        facts: dict[str, Json] = {"operators": _count(model)}
        return Artifact(path, files_of(path, model), self, inputs, outputs, recorded_options(model), facts)

    def summary(self, artifact: Artifact) -> str:
        """Say how many of the quantized operators run on integers."""
        quantized = artifact.facts.get("quantized", 0)
        if not quantized:
            return f"{artifact.facts.get('operators', 0)} operators, float"
        return f"{artifact.facts['integer']} of {quantized} quantized operators on integer kernels"

    def run_script(self, artifact: Artifact) -> str:
        """Return a script of numpy and onnxruntime alone."""
        return run_script(artifact.path.name, artifact.inputs, artifact.session_options)


def _count(model: ir.Model) -> int:
    return len(model.graph)


def _complaint(layer: Layer) -> str:
    reason = f": {layer.reason}" if layer.reason else ""
    return f"{layer.operator} is quantized, but ONNX Runtime runs it in float{reason}."
