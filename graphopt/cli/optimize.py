"""`graphopt optimize`: the whole job."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Container, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.cli import arguments
from graphopt.cli.arguments import (
    Data,
    Dynamic,
    Factory,
    Format,
    Input,
    ModelArguments,
    ModelPath,
    Seed,
    Served,
    Trust,
    Weights,
)
from graphopt.cli.depfile import rules as depfile_rules
from graphopt.errors import GateError, UsageError
from graphopt.files import REPORT, SCRATCH, remove_result, replacing
from graphopt.pipeline.registry import DEFAULT_PASSES, DEFAULT_TARGET

if TYPE_CHECKING:
    from graphopt.job.result import Result
    from graphopt.pipeline.pipeline import Pipeline

_FAIL_IF = (
    'End with exit code 1 if this holds: "drop>0.5" (points of --eval), "drop%>1", "size>0.5", "speedup<1", '
    '"error>0.1", "agreement<0.99".'
)


def command(
    model: ModelPath = None,
    passes: Annotated[
        str, typer.Option(help="Passes in order: name:option=value,name. Or a .toml file. Empty: only lower.")
    ] = DEFAULT_PASSES,
    data: Data = None,
    evaluation: Annotated[
        str | None, typer.Option("--eval", help="Labelled data, DATA[:metric], or module:function. Higher is better.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option("--target", help="onnxruntime (default), tensorrt; repeat for several.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Directory for the results. Default: MODEL.graphopt/")
    ] = None,
    inputs: Input = None,
    dynamic: Dynamic = None,
    served: Served = None,
    factory: Factory = None,
    weights: Weights = None,
    trust: Trust = False,
    plugin: Annotated[list[Path] | None, typer.Option(help="A Python file with passes of your own.")] = None,
    fail_if: Annotated[list[str] | None, typer.Option("--fail-if", help=_FAIL_IF)] = None,
    check: Annotated[str, typer.Option(help="fast, or full: prove every rewrite, export after every pass.")] = "fast",
    plan: Annotated[bool, typer.Option("--plan", help="Print what each pass decides as JSON; write nothing.")] = False,
    bench: Annotated[bool, typer.Option(help="Time the result against the original, and compare their files.")] = True,
    depfile: Annotated[Path | None, typer.Option(help="Write a Make/Ninja dependency file here.")] = None,
    dump: Annotated[Path | None, typer.Option(help="Write the graph after every pass into this directory.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Where passes compute: cpu, cuda:0, or auto for the accelerator if there is one.")
    ] = None,
    cache: Annotated[
        bool, typer.Option(help="Keep what passes decide, and use what they decided on the same things before.")
    ] = True,
    seed: Seed = 0,
    format: Format = "text",
) -> None:
    """Prune, factorise, quantize and lower a model; verify and time the result."""
    from graphopt.cli.gates import Gate, check_measured
    from graphopt.cli.gates import check as check_gates
    from graphopt.cli.progress import TerminalProgress
    from graphopt.data.served import served_inputs
    from graphopt.ir.devices import device_called
    from graphopt.job.job import Job
    from graphopt.job.result import check_place
    from graphopt.pipeline.hooks import Dump
    from graphopt.pipeline.registry import backends_named

    known = frozenset(sys.modules)
    arguments.check_format(format)
    source = ModelArguments(
        model=model,
        data=data,
        inputs=inputs,
        dynamic=dynamic,
        served=served,
        factory=factory,
        weights=weights,
        trust=trust,
        seed=seed,
    )
    gates = [Gate.parse(text) for text in fail_if or ()]
    pipeline = _pipeline(passes, plugin or ())
    directory = output or _default_directory(source)
    arguments.check_output(directory, dump=dump, depfile=depfile)
    backends = backends_named(target or [DEFAULT_TARGET])
    pipeline.check_targets(item.description for item in backends)
    computing = None if device is None else device_called(device)
    if not plan:
        check_place(directory, backends)
    times = bench and any(item.times_here for item in backends)
    check_measured(gates, evaluates=evaluation is not None, lowers=bool(backends) and not plan, times=times)
    may_fail = bool(gates) or any(step.instance.has_goal for step in pipeline.steps)
    failed = _directory_of_failure(directory, expected=may_fail and not plan)

    def rules() -> bytes:
        used = [model, weights, *_paths(data, evaluation, passes), *(plugin or ())]
        sources = _sources(pipeline, known, factory, data, evaluation)
        return depfile_rules([item.path_in(directory) for item in backends], [*used, *sources])

    if depfile is not None:
        rules()  # what it cannot say is refused before anything runs
    progress = TerminalProgress()
    program, samples = source.load()
    progress.done(f"{source.name}: loaded")
    job = Job(
        program,
        samples,
        evaluation=evaluation,
        backends=backends,
        seed=seed,
        progress=progress,
        name=source.name,
        device=computing,
        cache=cache,
        served=served_inputs(served or ()),
    )
    if not plan:
        job.check_targets()
    outcome = job.run(pipeline, hooks=[progress, *([Dump(dump)] if dump else ())], check=check)
    if plan:
        result = job.undelivered(outcome)
        json.dump([found.to_json() for found in result.plans], sys.stdout, indent=1)
        print()
        check_gates(gates, result.report)
        return
    result = job.deliver(outcome, bench=bench, sizes=bench or any(gate.quantity == "size" for gate in gates))
    if backends:
        progress.done(f"{', '.join(item.name for item in backends)}: lowered, verified{' and timed' if times else ''}")
    try:
        check_gates(gates, result.report)
    except (GateError, UsageError) as err:
        result.save(failed)
        _print(result, failed, format)
        raise type(err)(f"{err} The results are in {failed}; {directory} is as it was.") from err
    if depfile is not None:  # before the results: with them stands what they depend on
        with replacing(depfile) as temporary:
            temporary.write_bytes(rules())
    result.save(directory)
    if may_fail:
        remove_result(failed)  # it is of an earlier run
    _print(result, directory, format)


def _pipeline(passes: str, plugins: Sequence[Path]) -> Pipeline:
    from graphopt.pipeline.pipeline import Pipeline
    from graphopt.pipeline.registry import PassRegistry

    registry = PassRegistry(plugins)
    if passes.endswith(".toml"):
        return Pipeline.from_toml(Path(passes), registry)
    return Pipeline.parse(passes, registry)


def _default_directory(source: ModelArguments) -> Path:
    if source.model is not None:
        return source.model.with_name(f"{source.model.stem}.graphopt")
    if source.factory is not None:
        return Path(f"{source.factory.partition(':')[2] or source.factory}.graphopt")
    raise UsageError("Give the path of a model file, or --factory package.module:function.")


def _directory_of_failure(directory: Path, *, expected: bool) -> Path:
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


def _print(result: Result, directory: Path, format: str) -> None:
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


def _paths(*arguments: str | None) -> list[Path]:
    """Return those arguments that name files."""
    found = []
    for argument in arguments:
        for text in (argument, (argument or "").rpartition(":")[0]):
            if text and os.path.exists(text):  # unlike Path.exists, it takes any text
                found.append(Path(text))
                break
    return found


def _sources(pipeline: Pipeline, known: Container[str], *functions: str | None) -> list[Path]:
    """List the user's own source: of passes, and of functions that arguments name; relative in this directory."""
    from graphopt.caching.digests import modules_of
    from graphopt.caching.sources import files_of
    from graphopt.loading.functions import is_function_name

    named = [text.partition(":")[0] for text in functions if text and is_function_name(text)]
    files = files_of([*named, *(name for step in pipeline.steps for name in modules_of(step.instance))], known)
    here = Path.cwd()
    return [file.relative_to(here) if file.is_relative_to(here) else file for file in files]
