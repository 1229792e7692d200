"""`graphopt.open`: what `Result.save` wrote, as a result again."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic

from graphopt.capturing.load import load
from graphopt.data.served import served_inputs
from graphopt.errors import LoadError, UsageError, first_line, first_problem
from graphopt.files import MANIFEST, REPORT
from graphopt.ir.global_state import one_thread_at_a_time
from graphopt.job import manifest
from graphopt.job.replaying import read_plans
from graphopt.job.report import Report
from graphopt.job.result import Result
from graphopt.pipeline.pass_base import Pass
from graphopt.pipeline.registry import PassRegistry, backend

logger = logging.getLogger(__name__)


@one_thread_at_a_time()
def open(directory: str | Path, *, plugins: Sequence[Path | str | type[Pass[Any, Any]]] = ()) -> Result:
    """Open a directory that `Result.save` or `graphopt optimize -o` wrote: programs, artifacts, plans and report.

    Args:
        directory: where they are.
        plugins: files or classes of passes that made plans.

    Returns:
        What was saved. The unoptimised program is not among it: `original` is None.

    Raises:
        UsageError: there is no manifest, it or the report is damaged, or a pass or backend is not installed.
        LoadError: a file is missing or is not the one that was saved.
    """
    directory = Path(directory)
    if directory.is_file():
        raise UsageError(f"{directory} is a file. Give the directory that graphopt wrote it to: {directory.parent}")
    stored = manifest.read(directory / MANIFEST)
    used = (*stored.programs.values(), *(found.file for found in stored.artifacts.values()))
    stored.check_files(directory, {*stored.sha256, *used})
    for text in stored.other_libraries():
        logger.warning("%s was made with another version: %s.", directory, text)
    if elsewhere := stored.other_processor():
        logger.warning("%s was made on %s: times in its report are of that one.", directory, elsewhere)
    plans = read_plans(stored, directory, PassRegistry(plugins))
    artifacts = {
        target: dataclasses.replace(
            backend(target).open(directory / found.file), session_options=found.session_options, facts=found.facts
        )
        for target, found in stored.artifacts.items()
    }
    for artifact in artifacts.values() if elsewhere else ():
        for text in artifact.backend.advice(artifact):
            logger.warning("%s: %s.", artifact.path, text)
    return Result(
        original=None,
        programs={target: load(directory / name) for target, name in stored.programs.items()},
        plans=[plan for _, plan in plans],
        report=_report(directory / REPORT),
        artifacts=artifacts,
        pipeline=stored.pipeline,
        seed=stored.seed,
        plan_targets=[target for target, _ in plans],
        fingerprint=stored.original,
        served=served_inputs(stored.served),
        distillation=stored.distillation,
    )


def _report(path: Path) -> Report:
    try:
        return Report.from_json(manifest.read_json(path, "report"))
    except FileNotFoundError as err:
        raise LoadError(f"{path} is missing. Optimise again, or copy the whole directory.") from err
    except pydantic.ValidationError as err:
        raise UsageError(f"{path} is not a report: {first_problem(err)}. Optimise again.") from err
    except (ValueError, TypeError) as err:
        raise UsageError(f"{path} is not a report: {first_line(err)}. Optimise again.") from err
