"""`graphopt optimize`: the whole job."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.cli import arguments
from graphopt.cli.arguments import (
    Bench,
    Cache,
    Check,
    Data,
    Device,
    Dynamic,
    Evaluation,
    Factory,
    FailIf,
    Format,
    Input,
    ModelArguments,
    ModelPath,
    Output,
    Plugin,
    Preset,
    Seed,
    Served,
    Target,
    TensorBoardDirectory,
    Trust,
    Weights,
)
from graphopt.cli.delivering import (
    check_or_fail,
    chosen_passes,
    default_directory,
    directory_of_failure,
    pipeline_of,
    save,
)
from graphopt.cli.depfile import rules as depfile_rules
from graphopt.files import replacing
from graphopt.pipeline.registry import DEFAULT_PASSES, DEFAULT_TARGET

if TYPE_CHECKING:
    from graphopt.pipeline.pipeline import Pipeline


def command(
    model: ModelPath = None,
    passes: Annotated[
        str | None,
        typer.Option(
            help="Passes in order: name:option=value,name. Or a .toml file. Empty: only lower. "
            f"Default: {DEFAULT_PASSES}"
        ),
    ] = None,
    preset: Preset = None,
    data: Data = None,
    evaluation: Evaluation = None,
    target: Target = None,
    output: Output = None,
    inputs: Input = None,
    dynamic: Dynamic = None,
    served: Served = None,
    factory: Factory = None,
    weights: Weights = None,
    trust: Trust = False,
    plugin: Plugin = None,
    fail_if: FailIf = None,
    check: Check = "fast",
    plan: Annotated[bool, typer.Option("--plan", help="Print what each pass decides as JSON; write nothing.")] = False,
    bench: Bench = True,
    depfile: Annotated[Path | None, typer.Option(help="Write a Make/Ninja dependency file here.")] = None,
    dump: Annotated[Path | None, typer.Option(help="Write the graph after every pass into this directory.")] = None,
    device: Device = None,
    cache: Cache = True,
    tensorboard: TensorBoardDirectory = None,
    seed: Seed = 0,
    format: Format = "text",
) -> None:
    """Prune, factorise, quantize and lower a model; verify and time the result."""
    from graphopt.cli.gates import Gate, check_measured
    from graphopt.cli.gates import check as check_gates
    from graphopt.cli.progress import TerminalProgress, logging_to
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
    chosen = chosen_passes(passes, preset, otherwise=DEFAULT_PASSES)
    pipeline = pipeline_of(chosen, plugin or ())
    directory = output or default_directory(source)
    arguments.check_output(directory, dump=dump, depfile=depfile)
    backends = backends_named(target or [DEFAULT_TARGET])
    pipeline.check_targets(item.description for item in backends)
    computing = None if device is None else device_called(device)
    if not plan:
        check_place(directory, backends)
    times = bench and any(item.times_here for item in backends)
    check_measured(gates, evaluates=evaluation is not None, lowers=bool(backends) and not plan, times=times)
    may_fail = bool(gates) or any(step.instance.has_goal for step in pipeline.steps)
    failed = directory_of_failure(directory, expected=may_fail and not plan)

    def rules() -> bytes:
        used = [model, weights, *_paths(data, evaluation, chosen), *(plugin or ())]
        sources = _sources(pipeline, known, factory, data, evaluation)
        return depfile_rules([item.path_in(directory) for item in backends], [*used, *sources])

    if depfile is not None:
        rules()  # what it cannot say is refused before anything runs
    progress = TerminalProgress()
    logged = logging_to(tensorboard, progress)
    program, samples = source.load()
    progress.done(f"{source.name}: loaded")
    job = Job(
        program,
        samples,
        evaluation=evaluation,
        backends=backends,
        seed=seed,
        progress=logged,
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
    check_or_fail(result, gates, directory, failed, format)
    if depfile is not None:  # before the results: with them stands what they depend on
        with replacing(depfile) as temporary:
            temporary.write_bytes(rules())
    save(result, directory, failed if may_fail else None, format)


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
