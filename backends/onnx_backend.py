"""What backends share whose runtime reads ONNX: lowering, saving, opening, verifying and running files."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
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
from graphopt.backends.onnx_lowering.signature import check_kinds
from graphopt.errors import LoweringError
from graphopt.files import ScratchDirectory
from graphopt.ir.plain_data import Json
from graphopt.ir.program import Program
from graphopt.targets.backend import Array, Artifact, Backend, Session

_SAID = {True: "double precision", False: "bfloat16"}


class OnnxBackend(Backend):
    """Lowers to an ONNX file, which ONNX Runtime executes on this machine.

    A backend adds its target description, the style of its files, `options`, `check` and `summary`, and where it has
    something to say while lowering, `prepare` and `accept`.

    Attributes:
        style: how the runtime wants its ONNX.
        remark: a sentence for the docstring of the run script.
    """

    suffix: ClassVar[str] = ".onnx"
    style: ClassVar[Style]
    remark: ClassVar[str] = ""

    def __init__(self, *, external_data_above: int = EXTERNAL_DATA_ABOVE) -> None:
        """Prepare to lower.

        Args:
            external_data_above: bytes of weights from which on they are stored beside the model.
        """
        self._external_data_above = external_data_above

    @abstractmethod
    def options(self, model: ir.Model) -> dict[str, Json]:
        """Return the session options that `model` is recorded with, see `SessionSettings`."""

    def prepare(self, model: ir.Model, program: Program) -> tuple[ir.Model, dict[str, Json]]:
        """Return what is written for `model`, and facts for the artifact.

        Raises:
            LoweringError: the runtime would refuse it or compute something else.
        """
        return model, {}

    def accept(self, path: Path, model: ir.Model, program: Program) -> dict[str, Json]:
        """Return facts about the file at `path`, where `model` has been written.

        Raises:
            LoweringError: the runtime refuses it; the file goes.
        """
        return {}

    def accepts(self, program: Program) -> None:
        """Refuse types that numpy lacks; a program in a type that the runtime has few kernels for is lowered for it."""
        check_kinds((*program.inputs, *program.outputs))
        types = {tensor.dtype for tensor in (*program.state_dict().values(), *program.flat_examples())}
        if not types.isdisjoint((torch.bfloat16, torch.float64)):
            with ScratchDirectory() as place:
                artifact = self.lower(program, self.path_in(Path(place)))
                try:
                    self.session(artifact)
                except LoweringError as err:
                    said = f"Parts are in {_SAID[torch.float64 in types]}: convert them with `model.float()`."
                    raise LoweringError(f"{err} {said}") from err

    def lower(self, program: Program, path: Path) -> Artifact:
        """Write `program` as ONNX.

        Raises:
            LoweringError: an operator has no ONNX form, or the runtime refuses the result.
        """
        program = program.to("cpu")
        model, facts = self.prepare(lower(program, self.style), program)
        facts["operators"] = len(model.graph)
        files = save(model, path, external_data_above=self._external_data_above)
        try:
            facts.update(self.accept(path, model, program))
        except BaseException:  # what was not accepted, ^C or not, does not stay under the name of what was
            for file in files:
                file.unlink(missing_ok=True)
            raise
        return Artifact(path, files, self, program.inputs, program.outputs, self.options(model), facts)

    def verify(
        self,
        artifact: Artifact,
        program: Program,
        inputs: tuple[Array, ...] | None = None,
        session: Session | None = None,
    ) -> float:
        """Compare the file on disk with `program` on the recorded options; see `onnx_execution.verification`."""
        settings = dataclasses.replace(SessionSettings.of(artifact.session_options), threads=0)
        return verify(artifact.path, program.evaluated().to("cpu"), inputs, settings, session)

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
        inputs = specs(list(model.graph.inputs), path, model.metadata_props)
        outputs = specs(list(model.graph.outputs), path, {})
        facts: dict[str, Json] = {"operators": len(model.graph)}
        return Artifact(path, files_of(path, model), self, inputs, outputs, self.options(model), facts)

    def run_script(self, artifact: Artifact) -> str:
        """Return a script of numpy and onnxruntime alone."""
        return run_script(artifact.path.name, artifact.inputs, artifact.session_options, remark=self.remark)
