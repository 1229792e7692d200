"""Sessions of the ONNX Runtime of another Python: one for another processor, under an emulator.

`verified_by` lets verification run artifacts there; the program still runs here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from graphopt.backends.onnx_execution import verification
from graphopt.backends.onnx_execution.session import OnnxSession, SessionSettings
from graphopt.backends.onnxruntime import fusion
from graphopt.errors import LoweringError
from graphopt.targets.backend import Array

_SERVER = Path(__file__).with_name("serve_sessions.py")


class OtherRuntime:
    """The other Python, which serves sessions until the end of the block."""

    def __init__(self, python: Sequence[str]) -> None:
        """Start it.

        Args:
            python: the command that runs it: a path, behind that of an emulator perhaps.
        """
        self._folder = tempfile.TemporaryDirectory()
        self._process = subprocess.Popen(
            [*python, str(_SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._files = 0
        self.machine = str(self.ask(about="machine")["machine"])

    def file(self) -> Path:
        """Return the path of a file that is not there yet."""
        self._files += 1
        return Path(self._folder.name) / str(self._files)

    def ask(self, **what: Any) -> dict[str, Any]:
        """Ask for something and return the answer.

        Raises:
            LoweringError: the runtime there fails.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"The other Python ended with exit code {self._process.wait()}.")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise LoweringError(answer["error"])
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        self._folder.cleanup()


class OtherSession(OnnxSession):
    """A session there."""

    runtime: ClassVar[OtherRuntime]

    def __init__(
        self,
        model: Path | bytes,
        settings: SessionSettings,
        *,
        folder: Path | None = None,
        optimized: Path | None = None,
    ) -> None:
        """Load a model there; see `OnnxSession`."""
        config = dict(settings.config or {})
        if folder is not None:
            config["session.model_external_initializers_file_folder_path"] = str(folder)
        path = model if isinstance(model, Path) else self.runtime.file()
        if isinstance(model, bytes):
            path.write_bytes(model)
        options = {**dataclasses.asdict(settings), "config": config, "optimized": str(optimized or "")}
        answer = self.runtime.ask(about="load", model=str(path), options=options)
        self.inputs, self.outputs = tuple(answer["inputs"]), tuple(answer["outputs"])
        self._number = answer["session"]

    def _run(self, outputs: list[str] | None, inputs: Sequence[Array]) -> list[Array]:
        given, made = self.runtime.file(), self.runtime.file()
        with given.open("wb") as file:
            np.savez(file, **{f"{place}": array for place, array in enumerate(inputs)})
        self.runtime.ask(about="run", session=self._number, given=str(given), made=str(made), outputs=outputs)
        with np.load(made) as arrays:
            return [arrays[str(place)] for place in range(len(arrays))]


@contextlib.contextmanager
def verified_by(runtime: OtherRuntime) -> Iterator[None]:
    """Let artifacts be verified, and their kernels be read off, in the ONNX Runtime of another Python."""
    OtherSession.runtime = runtime
    rooms: tuple[Any, ...] = (verification, fusion)
    try:
        for room in rooms:
            room.OnnxSession = OtherSession
        yield
    finally:
        for room in rooms:
            room.OnnxSession = OnnxSession
