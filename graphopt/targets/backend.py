"""Backend: lowers a program to an artifact that a runtime executes without graphopt."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy as np

from graphopt.files import ScratchDirectory
from graphopt.ir.plain_data import Json
from graphopt.ir.program import Program
from graphopt.ir.signature import TensorSpec
from graphopt.targets.description import TargetDescription

Array = np.ndarray
Values = Literal["float", "integer", "turned", "other"]
TARGET_NAME = "[A-Za-z0-9_-]+"  # files bear the names of targets


class Session(Protocol):
    """A loaded artifact: called with one array per input, in order or by name, returns one per output, in order."""

    def __call__(self, /, *inputs: Array, **named: Array) -> tuple[Array, ...]:
        """Run once."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing a backend's check says about an artifact."""

    severity: str  # "error": the runtime refuses it or computes something else; "warning": slower than it could be
    node: str  # ONNX node or value, "" for the whole artifact
    text: str  # what is the matter, and what to do


@dataclass(frozen=True, slots=True)
class OperatorTime:
    """What one operator takes as the runtime runs it.

    Attributes:
        name: its node, in the graph that the runtime makes of the artifact.
        operator: which one.
        values: what it reads and writes: floats, integers of at most 8 bits, one turned into the other, or neither.
        seconds: of one call of the artifact.
    """

    name: str
    operator: str
    values: Values
    seconds: float


@dataclass(frozen=True, eq=False)
class Artifact:
    """A lowered program on disk.

    Attributes:
        path: the model file; external data lies beside it.
        files: every file that belongs to it, `path` first.
        backend: the backend that wrote it and can run it.
        inputs: its inputs, as the program's.
        outputs: its outputs, as the program's.
        session_options: recorded runtime options, as plain data: what `session()` uses and the manifest stores.
            Empty: the runtime's own defaults.
        facts: what the backend found out while lowering (integer operators reached, engine size, ...).
        home: the temporary directory its files are in, which lives as long as the artifact does; None for files that
            stay.

    A pickled artifact takes its files along.
    """

    path: Path
    files: tuple[Path, ...]
    backend: Backend
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    session_options: Mapping[str, Json] = field(default_factory=dict)
    facts: Mapping[str, Json] = field(default_factory=dict)
    home: ScratchDirectory | None = field(default=None, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the files' contents: where it is unpickled, their paths mean nothing."""
        contents = {file.name: file.read_bytes() for file in self.files}
        return _unpickled, (type(self), dataclasses.replace(self, home=None).__dict__, contents)

    def __copy__(self) -> Self:
        """Return the artifact itself: it is a value."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return the artifact itself: it is a value."""
        return self

    def moved(self, directory: Path, home: ScratchDirectory | None = None) -> Artifact:
        """Describe the same files in another directory."""
        files = tuple(directory / file.name for file in self.files)
        return dataclasses.replace(self, path=directory / self.path.name, files=files, home=home)

    @property
    def size(self) -> int:
        """Bytes on disk, external data included."""
        return sum(file.stat().st_size for file in self.files)

    def session(self, **options: Json) -> Session:
        """Load the artifact in its runtime.

        Args:
            options: override the recorded session options. Every backend understands `threads`: how many an
                operator may use, 0 for the runtime's choice.

        Raises:
            LoweringError: the runtime is missing or refuses the artifact.
        """
        return self.backend.session(self, **options)


def _unpickled(kind: type[Artifact], fields: Mapping[str, Any], contents: Mapping[str, bytes]) -> Artifact:
    home = ScratchDirectory()
    for name, content in contents.items():
        (Path(home.name) / name).write_bytes(content)
    return kind(**fields).moved(Path(home.name), home)


class Backend(ABC):
    """A runtime that programs are lowered to. Registered under `graphopt.backends`.

    Attributes:
        name: what `--target` calls it.
        suffix: how the names of its artifacts end, ".onnx".
        times_here: whether the time a session takes on this machine says anything about the target.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    times_here: ClassVar[bool] = True

    @property
    @abstractmethod
    def description(self) -> TargetDescription:
        """What passes need to know about the runtime."""

    def path_in(self, folder: Path, stem: str = "") -> Path:
        """Return where an artifact goes in `folder`: `onnxruntime.onnx`, or another stem."""
        return folder / f"{stem or self.name}{self.suffix}"

    def accepts(self, program: Program) -> None:  # noqa: B027 - nothing is known to fail
        """Look at a program before passes work on it: what is known by then to fail when it is lowered fails here.

        Raises:
            LoweringError: the runtime does not compute in the program's types.
        """

    @abstractmethod
    def lower(self, program: Program, path: Path) -> Artifact:
        """Write `program` to `path` (see `path_in`), external data beside it where needed.

        Identical input gives identical bytes. Nothing is left half-written.

        Raises:
            LoweringError: an operator has no lowering, or the runtime refuses the result.
        """

    @abstractmethod
    def check(self, artifact: Artifact) -> list[Finding]:
        """Say what the runtime will refuse, compute wrongly, or run slowly. Empty: nothing."""

    def advice(self, artifact: Artifact) -> list[str]:
        """Say what would suit a machine like this one better. Empty: nothing."""
        return []

    def operator_times(self, artifact: Artifact, inputs: Sequence[Array]) -> list[OperatorTime]:
        """Run it with one thread and say what each operator takes. Empty: the runtime does not tell.

        Raises:
            LoweringError: the runtime is missing or refuses the artifact.
        """
        return []

    @abstractmethod
    def verify(
        self,
        artifact: Artifact,
        program: Program,
        inputs: tuple[Array, ...] | None = None,
        session: Session | None = None,
    ) -> float:
        """Reload the artifact from disk, run it and compare with `program` at batch sizes 1, 3 and 8.

        At 1 and 3 alone where all twelve samples would take more than 2e10 operations.

        Args:
            artifact: what `lower` wrote.
            program: what it must compute.
            inputs: realistic inputs to draw the batches from (first axis: samples); the program's examples if None.
            session: the artifact, loaded from disk with its recorded options; None to load it.

        Returns:
            The largest error relative to the largest output.

        Raises:
            LoweringError: an output differs by more than float tolerance or, where integers are involved, by more
                than one quantization step.
        """

    @abstractmethod
    def session(self, artifact: Artifact, **options: Json) -> Session:
        """Load `artifact` in the runtime; `options` override those it was recorded with.

        Raises:
            LoweringError: the runtime is missing or refuses the artifact.
        """

    @abstractmethod
    def open(self, path: Path) -> Artifact:
        """Describe an artifact that `lower` wrote earlier.

        Raises:
            LoweringError: the file is missing or no artifact of this backend.
        """

    @abstractmethod
    def summary(self, artifact: Artifact) -> str:
        """Say in a few words what lowering reached ("21 of 21 convolutions int8"), for the report's table."""

    @abstractmethod
    def run_script(self, artifact: Artifact) -> str:
        """Return a Python script of a few lines that runs the artifact beside it without graphopt."""
