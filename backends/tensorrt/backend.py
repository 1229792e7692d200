"""The TensorRT backend: programs become ONNX files that TensorRT parses and compiles to int8 kernels."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from graphopt.backends.onnx_backend import OnnxBackend
from graphopt.backends.onnx_execution.batches import batches
from graphopt.backends.onnx_execution.run_script import run_script
from graphopt.backends.onnx_execution.session import OnnxSession
from graphopt.backends.onnx_execution.stand_in import stand_in
from graphopt.backends.onnx_lowering.artifacts import read_model
from graphopt.backends.onnx_lowering.lowering import Style
from graphopt.backends.tensorrt import engine
from graphopt.backends.tensorrt.block_weights import BlockWeightsPass
from graphopt.backends.tensorrt.description import DESCRIPTION
from graphopt.backends.tensorrt.rules import check_model
from graphopt.backends.tensorrt.sparsity import sparse_layers
from graphopt.errors import LoweringError
from graphopt.ir.plain_data import Json
from graphopt.ir.program import Program
from graphopt.targets.backend import Array, Artifact, Finding, Session
from graphopt.targets.description import TargetDescription

# ONNX Runtime's optimizer moves and merges quantizations; left alone it computes them one by one, as the file says.
_LITERALLY: dict[str, Json] = {"threads": 0, "optimization": "disabled"}
_NOT_INSTALLED = "tensorrt-rtx is not installed: neither parsed nor built (pip install 'graphopt[tensorrt]')"


class TensorRTBackend(OnnxBackend):
    """Lowers to ONNX for TensorRT.

    There is no NVIDIA GPU to be counted on where graphopt runs, so `session` and `verify` execute the artifact in
    ONNX Runtime on the CPU, literally. What TensorRT itself says is asked of its parser and builder, which need no
    GPU.
    """

    name: ClassVar[str] = "tensorrt"
    times_here: ClassVar[bool] = False
    style: ClassVar[Style] = Style(opset=DESCRIPTION.opset, kernels=(BlockWeightsPass,))
    remark: ClassVar[str] = (
        "ONNX Runtime stands in for TensorRT here: its numbers, not its speed. Build with trtexec there."
    )

    @property
    def description(self) -> TargetDescription:
        """What passes need to know about the runtime."""
        return DESCRIPTION

    def options(self, model: ir.Model) -> dict[str, Json]:
        """Let ONNX Runtime execute the file literally."""
        return dict(_LITERALLY)

    def prepare(self, model: ir.Model, program: Program) -> tuple[ir.Model, dict[str, Json]]:
        """Apply the rules TensorRT was measured to follow.

        Raises:
            LoweringError: TensorRT refuses the model or would compute something else.
        """
        errors = [finding for finding in check_model(model) if finding.severity == "error"]
        if errors:
            raise LoweringError(f"TensorRT cannot take the program: {_listed(errors)}")
        return model, {}

    def accept(self, path: Path, model: ir.Model, program: Program) -> dict[str, Json]:
        """Have TensorRT build the file where `tensorrt-rtx` is installed.

        Raises:
            LoweringError: it refuses.
        """
        sparse = _sparse_facts(model)
        return {**sparse, **_engine_facts(path, program, sparse=bool(sparse))}

    def check(self, artifact: Artifact) -> list[Finding]:
        """Apply the rules TensorRT was measured to follow."""
        return check_model(read_model(artifact.path))

    def session(self, artifact: Artifact, **options: Json) -> OnnxSession:
        """Load the artifact in ONNX Runtime, with float32 in place of bfloat16, which that does not compute in."""
        return super().session(stand_in(artifact), **options)

    def verify(
        self,
        artifact: Artifact,
        program: Program,
        inputs: tuple[Array, ...] | None = None,
        session: Session | None = None,
    ) -> float:
        """Compare the artifact with `program` in ONNX Runtime, as `session` runs it."""
        return super().verify(stand_in(artifact), program, inputs, session)

    def run_script(self, artifact: Artifact) -> str:
        """Return a script that runs the artifact in ONNX Runtime, and says where that cannot."""
        if stand_in(artifact) is artifact:
            return super().run_script(artifact)
        remark = "ONNX Runtime has no bfloat16 kernels and refuses this file. Build it with trtexec."
        return run_script(artifact.path.name, artifact.inputs, artifact.session_options, remark=remark)

    def summary(self, artifact: Artifact) -> str:
        """Say what TensorRT's builder made of the artifact."""
        memory = artifact.facts.get("weights_memory")
        if not isinstance(memory, int):
            return "not built"
        sparse = artifact.facts.get("sparse_layers")
        with_zeros = f", {sparse} of {artifact.facts['layers']} layers 2:4 sparse" if sparse else ""
        return f"built for {artifact.facts['compute_capability']}, weights {memory / 1e6:.1f} MB{with_zeros}"


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
