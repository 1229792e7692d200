"""Where results of a run go, what of a run that fails its gate, and what is printed of them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.cli.arguments import ModelArguments
from graphopt.errors import GateError, UsageError
from graphopt.files import REPORT, SCRATCH, remove_result

if TYPE_CHECKING:
    from graphopt.cli.gates import Gate
    from graphopt.job.result import Result
    from graphopt.pipeline.pipeline import Pipeline


def chosen_passes(passes: str | None, preset: str | None, *, otherwise: str) -> str:
    """Return the passes that are given, by themselves or by a preset.

    Raises:
        UsageError: by both, or the preset is one of a distillation.
    """
    if preset is None:
        return otherwise if passes is None else passes
    from graphopt.pipeline.preset_files import preset_called

    found = preset_called(preset)
    if passes is not None:
        raise UsageError(f"--preset {preset} brings its passes, {found.passes!r}. Leave out --passes, or the preset.")
    if found.plan:
        raise UsageError(f"The preset {preset} is of a distillation: graphopt distill STUDENT --preset {preset}.")
    return found.passes


def pipeline_of(passes: str, plugins: Sequence[Path]) -> Pipeline:
    """Return the pipeline of a text or a file."""
    from graphopt.pipeline.pipeline import Pipeline
    from graphopt.pipeline.registry import PassRegistry

    registry = PassRegistry(plugins)
    if passes.endswith(".toml"):
        return Pipeline.from_toml(Path(passes), registry)
    return Pipeline.parse(passes, registry)


def default_directory(source: ModelArguments) -> Path:
    """Return where results go that are not told: beside the model."""
    if source.model is not None:
        return source.model.with_name(f"{source.model.stem}.graphopt")
    if source.factory is not None:
        return Path(f"{source.factory.partition(':')[2] or source.factory}.graphopt")
    raise UsageError("Give the path of a model file, or --factory package.module:function.")


def directory_of_failure(directory: Path, *, expected: bool) -> Path:
    """Return where results go whose gate fails, so that no build takes them for good ones.

    Raises:
        UsageError: there is a directory of that name that no run wrote, which a failure would replace.
    """
    named = directory if directory.name not in ("", "..") else directory.resolve()
    failed = Path(f"{named}.failed")
    names = [path.name for path in failed.iterdir()] if failed.is_dir() else []
    written = REPORT in names or any(name.startswith(SCRATCH) for name in names)  # the latter by one killed
    empty = failed.is_dir() and not names
    if expected and (failed.is_symlink() or (failed.exists() and not written and not empty)):
        raise UsageError(f"{failed} is where results go if a gate fails, and holds something else. Move it away.")
    return failed


def check_or_fail(result: Result, gates: Iterable[Gate], directory: Path, failed: Path, format: str) -> None:
    """Look at the gates; results that fail one go to a directory of their own.

    Raises:
        GateError: one fails.
        UsageError: its quantity was not measured.
    """
    from graphopt.cli.gates import check

    try:
        check(gates, result.report)
    except (GateError, UsageError) as err:
        result.save(failed)
        show(result, failed, format)
        raise type(err)(f"{err} The results are in {failed}; {directory} is as it was.") from err


def save(result: Result, directory: Path, failed: Path | None, format: str) -> None:
    """Write a result and print it; `failed` is what an earlier run left that failed, and goes."""
    result.save(directory)
    if failed is not None:
        remove_result(failed)
    show(result, directory, format)


def show(result: Result, directory: Path, format: str) -> None:
    """Print the report of a result and the files in its directory."""
    from graphopt.cli.table import count, print_report, terminal

    if format == "json":
        json.dump(result.report.to_json(), sys.stdout, indent=1)
        print()
        return
    console = terminal(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 150)
    print_report(result.report, console)
    for name in result.report.files:
        size = (directory / name).stat().st_size
        console.print(f"{count(size) + 'B':>8}  {directory / name}", soft_wrap=True)
