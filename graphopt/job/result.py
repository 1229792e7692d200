"""Result: what an optimisation made, and writing it to a directory."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphopt.data.served import ServedInput
from graphopt.errors import LoadError, UsageError
from graphopt.files import MANIFEST, REPORT, check_replaceable, replacing_directory, sha256
from graphopt.ir.plain_data import Json
from graphopt.ir.program import Program
from graphopt.job import manifest
from graphopt.job.report import Report
from graphopt.pipeline.plan import Plan
from graphopt.targets.backend import Artifact, Backend


@dataclass(eq=False, repr=False)
class Result:
    """What `optimize` made.

    Attributes:
        original: the program as captured; it may read the tensors of the module that `optimize` was given, and change
            with them, not with those of `programs`. None for a result that was opened.
        programs: the optimised program of each target, keyed by target name ("" where no pass asked for one).
        plans: every pass's plan, in pipeline order.
        report: the before/after table, refusals and notes.
        artifacts: the lowered program of each target.
        pipeline: text of the pipeline, as the user would write it.
        seed: every random draw descended from it.
        plan_targets: the target each plan was made for, "" before the pipeline forked.
        fingerprint: of the original as it was captured.
        served: which inputs are taken as they are served, not as the model takes them.
        distillation: how the original was taught, as plain data: the plan, teachers, losses; empty where it was not.
    """

    original: Program | None
    programs: dict[str, Program]
    plans: list[Plan]
    report: Report
    artifacts: dict[str, Artifact]
    pipeline: str
    seed: int
    plan_targets: list[str]
    fingerprint: str = ""
    served: Sequence[ServedInput] = ()
    distillation: Mapping[str, Json] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Note what was captured and what was lowered."""
        fingerprint = functools.cache(manifest.fingerprint)  # what no pass rewrote is read once
        if not self.fingerprint and self.original is not None:
            self.fingerprint = fingerprint(self.original)
        self._lowered = {target: fingerprint(self.programs[target].evaluated()) for target in self.artifacts}

    def __repr__(self) -> str:
        targets = ", ".join(self.artifacts) or "no target"
        return f"<Result of {self.report.pipeline!r} on {self.report.model} for {targets}>"

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

        Raises:
            LoadError: a file of an artifact is gone.
            UsageError: the directory cannot be written to, or a program was changed after it was lowered.
        """
        directory = Path(directory)
        self._check_unchanged()
        lost = [file for found in self.artifacts.values() for file in found.files if not file.is_file()]
        if lost:
            raise LoadError(
                f"{lost[0]}, which belongs to this result, is gone. Optimise again, or open what was saved."
            )
        with replacing_directory(directory) as temporary:
            names = self._write(temporary)
        self.artifacts = {target: found.moved(directory) for target, found in self.artifacts.items()}
        return [directory / name for name in names]

    def _write(self, directory: Path) -> list[str]:
        brought = {target: found.moved(directory) for target, found in self.artifacts.items()}
        written: list[Path] = []
        for target, found in brought.items():
            source = self.artifacts[target]
            for pair in zip(source.files, found.files, strict=True):
                _bring(*pair, temporary=source.home is not None)
            written += found.files
        programs = {target: self._named("program", target, "pt2") for target in self.programs}
        written += [self.programs[target].save(directory / name) for target, name in programs.items()]
        for target, found in brought.items():
            script = directory / self._named("run", target, "py")
            script.write_text(found.backend.run_script(found))
            written.append(script)
        if self.distillation and self.original is not None:
            written.append(manifest.write_learned(directory, self.original))
        written += manifest.write_payload(directory, self.plans)
        stored = manifest.Manifest(
            model=self.report.model,
            original=self.fingerprint,
            pipeline=self.pipeline,
            served=[str(one) for one in self.served],
            distillation=json.loads(json.dumps(dict(self.distillation))),
            seed=self.seed,
            libraries=manifest.library_versions(),
            cpu=manifest.cpu_features(),
            plans=[manifest.StoredPlan.of(*pair) for pair in zip(self.plan_targets, self.plans, strict=True)],
            programs=programs,
            artifacts={name: manifest.StoredArtifact.of(found) for name, found in brought.items()},
            sha256={file.name: sha256(file) for file in written},
        )
        self.report.files = [*(file.name for file in written), MANIFEST, REPORT]
        self.report.save(directory / REPORT)
        stored.write(directory)  # last: by it whoever clears up after a kill knows what all of this is
        return self.report.files

    def _check_unchanged(self) -> None:
        for target, before in self._lowered.items():
            if manifest.fingerprint(self.programs[target].evaluated()) == before:
                continue
            raise UsageError(
                f"The program for {target} was changed after it was lowered, trained perhaps, and its artifact is "
                'still the one before. Lower it again, graphopt.optimize(result.program, passes=""), and save that.'
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what was pickled."""
        self.__dict__.update(state)
        self.__post_init__()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle what is as it was lowered; names in an unpickled graph are others, which `fingerprint` is not."""
        self._check_unchanged()
        return self.__dict__

    def _named(self, stem: str, target: str, ending: str) -> str:
        return _file_name(stem, target, ending, of=len(self.programs))


def _bring(source: Path, target: Path, *, temporary: bool) -> None:
    """Copy a file; one that goes soon keeps its bytes and gets a second name, where its file system can do that.

    Raises:
        OSError: there is no such file, or no room for it.
    """
    if temporary and source.stat().st_nlink == 1:  # of two that stay, whoever writes to one would write to the other
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)


def _file_name(stem: str, target: str, ending: str, *, of: int) -> str:
    """One target: `run.py`. Several: `run.onnxruntime.py`."""
    return f"{stem}.{ending}" if of == 1 else f"{stem}.{target}.{ending}"


def check_place(directory: Path, backends: Sequence[Backend]) -> None:
    """Say before anything runs what the result of a run for these targets may not replace.

    Raises:
        UsageError: there is a file in its place, or something else, that no run wrote.
    """
    names = [manifest.PAYLOAD, manifest.DISTILLED, MANIFEST, REPORT]
    for item in backends:
        names += [item.path_in(directory).name, _file_name("run", item.name, "py", of=len(backends))]
    targets = [item.name for item in backends] or [""]
    names += [_file_name("program", target, "pt2", of=len(targets)) for target in targets]
    check_replaceable(directory, names)
