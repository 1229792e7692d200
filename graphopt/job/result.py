"""Result: what an optimisation made, and writing it to a directory."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from graphopt.errors import UsageError
from graphopt.files import replacing_directory
from graphopt.ir.program import Program
from graphopt.job import manifest
from graphopt.job.report import Report
from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.plan import Plan
from graphopt.targets.backend import Artifact


@dataclass(eq=False, repr=False)
class Result:
    """What `optimize` made.

    Attributes:
        original: the program as captured.
        programs: the optimised program of each target, keyed by target name ("" where no pass asked for one).
        plans: every pass's plan, in pipeline order.
        report: the before/after table, refusals and notes.
        artifacts: the lowered program of each target.
    """

    original: Program
    programs: dict[str, Program]
    plans: list[Plan]
    report: Report
    artifacts: dict[str, Artifact]
    pipeline: Pipeline
    seed: int
    _plan_targets: list[str] = field(default_factory=list, repr=False)
    _home: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        targets = ", ".join(self.artifacts) or "no target"
        return f"<Result of {str(self.pipeline)!r} on {self.report.model} for {targets}>"

    @property
    def program(self) -> Program:
        """The optimised program; with several targets that of the first."""
        return next(iter(self.programs.values()))

    @property
    def artifact(self) -> Artifact:
        """The lowered program; with several targets that of the first.

        Raises:
            UsageError: there was no target.
        """
        if not self.artifacts:
            raise UsageError("Nothing was lowered: optimize() was called with target=None or lower=False.")
        return next(iter(self.artifacts.values()))

    def save(self, directory: str | Path) -> list[Path]:
        """Write artifacts, programs, manifest, report and run scripts; all of them or none.

        Returns:
            The files written, artifacts first.
        """
        directory = Path(directory)
        with replacing_directory(directory) as temporary:
            names = self._write(temporary)
        self.artifacts = {
            target: dataclasses.replace(
                found, path=directory / found.path.name, files=tuple(directory / file.name for file in found.files)
            )
            for target, found in self.artifacts.items()
        }
        return [directory / name for name in names]

    def _write(self, directory: Path) -> list[str]:
        written: list[Path] = []
        copied: dict[str, Artifact] = {}
        for target, found in self.artifacts.items():
            files = tuple(Path(shutil.copyfile(file, directory / file.name)) for file in found.files)
            copied[target] = dataclasses.replace(found, path=directory / found.path.name, files=files)
            written += files
        for target, program in self.programs.items():
            written.append(program.save(directory / self._named("program", target, "pt2")))
        for target, found in copied.items():
            script = directory / self._named("run", target, "py")
            script.write_text(found.backend.run_script(found))
            written.append(script)
        written += manifest.write(
            directory,
            model=self.report.model,
            original=self.original,
            pipeline=self.pipeline.text,
            seed=self.seed,
            plans=list(zip(self._plan_targets, self.plans, strict=True)),
            artifacts=copied,
            files=written,
        )
        self.report.files = [*(file.name for file in written), "report.json"]
        self.report.save(directory / "report.json")
        return self.report.files

    def _named(self, stem: str, target: str, ending: str) -> str:
        """One target: `run.py`. Several: `run.onnxruntime.py`."""
        return f"{stem}.{ending}" if len(self.programs) == 1 else f"{stem}.{target}.{ending}"
