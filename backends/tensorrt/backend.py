"""The TensorRT backend: programs become ONNX files that TensorRT parses and compiles to int8 kernels."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from graphopt.backends.onnx_execution.batches import batches
from graphopt.backends.onnx_execution.run_script import run_script
from graphopt.backends.onnx_execution.session import OnnxSession, SessionSettings
from graphopt.backends.onnx_execution.verification import verify
from graphopt.backends.onnx_lowering.artifacts import files_of, read_model, specs
from graphopt.backends.onnx_lowering.lowering import Style, lower
from graphopt.backends.onnx_lowering.saving import EXTERNAL_DATA_ABOVE, save
from graphopt.backends.tensorrt import engine
from graphopt.backends.tensorrt.description import DESCRIPTION
from graphopt.backends.tensorrt.rules import check_model
from graphopt.backends.tensorrt.sparsity import sparse_layers
from graphopt.errors import LoweringError
from graphopt.ir.plain_data import Json
from graphopt.ir.program import Program
from graphopt.targets.backend import Array, Artifact, Backend, Finding
from graphopt.targets.description import TargetDescription

# ONNX Runtime's optimizer moves and merges quantizations; left alone it computes them one by one, as the file says.
_LITERALLY: dict[str, Json] = {"threads": 0, "optimization": "disabled"}
_NOT_INSTALLED = "tensorrt-rtx is not installed: neither parsed nor built (pip install 'graphopt[tensorrt]')"
_REMARK = "ONNX Runtime stands in for TensorRT here: its numbers, not its speed. Build with trtexec there."


class TensorRTBackend(Backend):
    """Lowers to ONNX for TensorRT.

    There is no NVIDIA GPU to be counted on where graphopt runs, so `session` and `verify` execute the artifact in
    ONNX Runtime on the CPU, literally. What TensorRT itself says is asked of its parser and builder, which need no
    GPU.
    """

    name: ClassVar[str] = "tensorrt"
    times_here: ClassVar[bool] = False

    def __init__(self, *, external_data_above: int = EXTERNAL_DATA_ABOVE) -> None:
        """Prepare to lower.

        Args:
            external_data_above: bytes of weights from which on they are stored beside the model.
        """
        self._external_data_above = external_data_above

    @property
    def description(self) -> TargetDescription:
        """What passes need to know about the runtime."""
        return DESCRIPTION

    def lower(self, program: Program, path: Path) -> Artifact:
        """Write `program` as ONNX, and have TensorRT build it where `tensorrt-rtx` is installed.

        Raises:
            LoweringError: an operator has no ONNX form, or TensorRT refuses the result or would compute something
                else.
        """
        model = lower(program, Style(opset=DESCRIPTION.opset))
        errors = [finding for finding in check_model(model) if finding.severity == "error"]
        if errors:
            raise LoweringError(f"TensorRT cannot take the program: {_listed(errors)}")
        files = save(model, path, external_data_above=self._external_data_above)
        facts: dict[str, Json] = {"operators": len(model.graph)}
        try:
            facts.update(_sparse_facts(model))
            facts.update(_engine_facts(path, program, sparse=bool(facts.get("sparse_layers"))))
        except LoweringError:
            for file in files:
                file.unlink(missing_ok=True)
            raise
        return Artifact(path, files, self, program.inputs, program.outputs, dict(_LITERALLY), facts)

    def check(self, artifact: Artifact) -> list[Finding]:
        """Apply the rules TensorRT was measured to follow."""
        return check_model(read_model(artifact.path))

    def verify(self, artifact: Artifact, program: Program, inputs: tuple[Array, ...] | None = None) -> float:
        """Compare the file on disk, executed literally by ONNX Runtime, with `program`."""
        return verify(artifact.path, program, inputs, SessionSettings.of(_LITERALLY))

    def session(self, artifact: Artifact, **options: Json) -> OnnxSession:
        """Load the artifact in ONNX Runtime, which stands in for TensorRT on a machine without its GPU."""
        return OnnxSession(artifact.path, SessionSettings.of({**artifact.session_options, **options}))

    def open(self, path: Path) -> Artifact:
        """Describe an ONNX file."""
        path = Path(path)
        model = read_model(path)
        inputs, outputs = specs(list(model.graph.inputs), path), specs(list(model.graph.outputs), path)
        facts: dict[str, Json] = {"operators": len(model.graph)}
        return Artifact(path, files_of(path, model), self, inputs, outputs, dict(_LITERALLY), facts)

    def summary(self, artifact: Artifact) -> str:
        """Say what TensorRT's builder made of the artifact."""
        memory = artifact.facts.get("weights_memory")
        if not isinstance(memory, int):
            return "not built"
        sparse = artifact.facts.get("sparse_layers")
        with_zeros = f", {sparse} of {artifact.facts['layers']} layers 2:4 sparse" if sparse else ""
        return f"built for {artifact.facts['compute_capability']}, weights {memory / 1e6:.1f} MB{with_zeros}"

    def run_script(self, artifact: Artifact) -> str:
        """Return a script of numpy and onnxruntime alone."""
        return run_script(artifact.path.name, artifact.inputs, artifact.session_options, remark=_REMARK)


def _sparse_facts(model: ir.Model) -> dict[str, Json]:
    """Say how many layers have sparse weights, and which flag the engine is to be built with; nothing if none has."""
    form = DESCRIPTION.sparsity
    assert form is not None
    found = sparse_layers(model, nonzeros=form.nonzeros, group=form.group)
    if not found.sparse:
        return {}
    return {"sparse_layers": found.sparse, "layers": found.layers, "builder_flags": ["SPARSE_WEIGHTS"]}


def _engine_facts(path: Path, program: Program, *, sparse: bool) -> dict[str, Json]:
    if not engine.available():
        return {"engine": _NOT_INSTALLED}
    shapes = [tuple(array.shape for array in arrays) for _, arrays in batches(program, None)]
    built = engine.build(path, shapes, sparse=sparse)
    return {
        "engine": f"built by tensorrt-rtx {built.version}",
        "compute_capability": built.compute_capability,
        "weights_memory": built.weights_memory,
        "sparse_kernels_allowed": built.sparse,
    }


def _listed(errors: list[Finding]) -> str:
    lines = [f"{finding.node}: {finding.text}" if finding.node else finding.text for finding in errors]
    more = f" And {len(lines) - 3} more." if len(lines) > 3 else ""
    return " ".join(lines[:3]) + more
