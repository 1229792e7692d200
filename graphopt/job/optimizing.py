"""The whole job: capture, run the pipeline, lower, verify, time, report."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from graphopt.capturing.load import capture_on
from graphopt.capturing.model_calls import check_module
from graphopt.data import Samples
from graphopt.data.batches import Batch, SampleSource, whole_batches
from graphopt.errors import DataError, UsageError
from graphopt.ir.program import Program
from graphopt.ir.regions import compiled_for_their_shapes
from graphopt.job.deliver import deliver
from graphopt.job.recorder import Recorder
from graphopt.job.report import Report
from graphopt.job.result import Result
from graphopt.measure.cost import cost
from graphopt.measure.equivalence import Probe
from graphopt.measure.evaluate import Evaluator, FunctionEvaluator, evaluator
from graphopt.measure.stopwatch import Stopwatch
from graphopt.pipeline.context import Context, Loss, NoProgress, Progress
from graphopt.pipeline.hooks import FullCheck, Hook
from graphopt.pipeline.pass_base import Pass
from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.registry import PassRegistry, backend
from graphopt.pipeline.runner import run
from graphopt.targets.backend import Backend

# Samples that every row's output error is measured on: as many as cost this many operations, within bounds.
_PROBE_FLOPS = 2e10
_FEWEST_PROBES, _MOST_PROBES = 2, 32
DEFAULT_PASSES = "prune,svd,int8"
DEFAULT_TARGET = "onnxruntime"


@compiled_for_their_shapes()
def optimize(
    model: nn.Module | Program,
    data: Any = None,
    passes: str | Sequence[Any] | Pipeline = DEFAULT_PASSES,
    target: str | Backend | Sequence[str | Backend] | None = DEFAULT_TARGET,
    eval: Any = None,
    seed: int = 0,
    *,
    loss: Loss | None = None,
    dynamic_shapes: Any = None,
    plugins: Sequence[Path | str | type[Pass[Any, Any]]] = (),
    hooks: Sequence[Hook] = (),
    check: str = "fast",
    bench: bool = True,
    lower: bool = True,
    progress: Progress | None = None,
    name: str | None = None,
) -> Result:
    """Optimise a model for one or several runtimes.

    Args:
        model: a module (captured on the first samples of `data`) or a program.
        data: calibration data: a tensor or array (first axis: samples), a tuple or dict of them, an iterable of
            batches, or a path. Passes that learn from data use it; without it they say so.
        passes: pipeline text, or a sequence of passes. "" only captures and lowers.
        target: a backend's name, a backend, several of them, or None for no lowering; passes that decide by their
            target then decide for ONNX Runtime.
        eval: a callable that takes anything callable like the model and returns a number, higher is better; or
            labelled data, `(data, metric)`.
        seed: every random draw descends from it.
        loss: what the model was trained for, called with its output and the labels of the same samples (None where
            `data` has none); returns a scalar. Criteria that follow gradients use it, and do without it.
        dynamic_shapes: further dynamic axes, as `capture` takes them.
        plugins: files or classes of passes that the pipeline may name.
        hooks: called around every pass.
        check: "fast", or "full" to export again and run each pass's own proof after it.
        bench: whether to time the artifact against the unoptimised program in the same runtime.
        lower: False decides and rewrites for the targets, and stops before lowering.
        progress: shows long loops.
        name: what the report calls the model.

    Returns:
        The programs, plans, artifacts and the report. Artifacts live in a temporary directory until `Result.save`.

    Raises:
        GraphOptError: see its subclasses; nothing is left behind.
    """
    if check not in ("fast", "full"):
        raise UsageError(f"check={check!r} is not known. Use 'fast' or 'full'.")
    pipeline = Pipeline.parse(passes, PassRegistry(plugins))
    backends = [backend(item) if isinstance(item, str) else item for item in _listed(target)]
    program, samples = _program_and_samples(model, data, dynamic_shapes)
    metric = None if eval is None else _evaluator(eval, program)
    report = Report(name or _name(model), str(pipeline), metric.name if metric else "")
    report.notes += [f"{note.subject}: {note.text}" for note in program.notes]
    report.notes += [f"data: {note}" for note in (samples.notes if samples else ())]
    deciding = backends
    if not backends and pipeline.fork() < len(pipeline.steps):
        deciding = [backend(DEFAULT_TARGET)]
        first = pipeline.steps[pipeline.fork()].text
        report.notes.append(f"target: none was given, so `{first}` and what follows decided for {DEFAULT_TARGET}")
    ctx = Context(
        original=program,
        targets=tuple(item.description for item in deciding),
        loss=loss,
        timers={item.name: Stopwatch(item) for item in deciding if item.times_here},
        seed=seed,
        progress=progress or NoProgress(),
    )
    if samples is not None:
        ctx = ctx.with_data(samples)
    probe = Probe(program, _probe_inputs(program, ctx.held_out or ctx.samples))
    if ctx.samples and not ctx.held_out and any(step.instance.tolerance is None for step in pipeline.steps):
        report.notes.append("data: too few samples to hold some out: passes may have fitted what errors are taken on")
    recorder = Recorder(report, program, probe, metric)
    recorder.add_original()
    checks = [FullCheck()] if check == "full" else []
    outcome = run(pipeline, program, ctx, [recorder, *checks, *hooks])
    home = tempfile.TemporaryDirectory(prefix="graphopt-")
    artifacts = {
        item.name: deliver(
            item,
            outcome.programs[item.name],
            program,
            Path(home.name),
            report,
            probe=probe,
            metric=metric,
            bench=bench,
        )
        for item in (backends if lower else ())
    }
    return Result(
        original=program,
        programs=outcome.programs,
        plans=[plan for _, plan in outcome.plans],
        report=report,
        artifacts=artifacts,
        pipeline=pipeline,
        seed=seed,
        _plan_targets=[name for name, _ in outcome.plans],
        _home=home,
    )


def _listed(target: str | Backend | Sequence[str | Backend] | None) -> list[str | Backend]:
    if target is None:
        return []
    if isinstance(target, str):
        return [part.strip() for part in target.split(",") if part.strip()]
    return [target] if isinstance(target, Backend) else list(target)


def _name(model: nn.Module | Program) -> str:
    return "program" if isinstance(model, Program) else type(model).__name__


def _program_and_samples(model: nn.Module | Program, data: Any, dynamic_shapes: Any) -> tuple[Program, Samples | None]:
    """Capture the model unless it is a program, and fit the data to its inputs."""
    if not isinstance(model, Program):
        check_module(model)
    if isinstance(model, Program):
        program = model
    elif data is None:
        raise DataError(
            "A module cannot be captured without example inputs. Give data=..., or capture it first: "
            "graphopt.capture(model, (example,))."
        )
    else:
        program = capture_on(model, data, dynamic_shapes)
    if data is None:
        return program, None
    samples = Samples.open(data, [spec.name for spec in program.inputs])
    samples.check(program.inputs)
    return program, samples


def _evaluator(spec: Any, program: Program) -> Evaluator | FunctionEvaluator:
    return evaluator(spec, specs=program.inputs, fixed_batch=program.batch_size)


def _probe_inputs(program: Program, samples: SampleSource | None) -> Batch:
    """Return the inputs that errors are measured on: real samples if there are any."""
    if samples is None:
        return program.flat_examples()
    if program.batch_size is not None:
        batches = whole_batches(samples, program.batch_size, None, fixed=program.batch_size)
        return next(batches, program.flat_examples())
    affordable = int(_PROBE_FLOPS // max(cost(program).flops, 1))
    count = min(max(affordable, _FEWEST_PROBES), _MOST_PROBES)
    return max(samples.batches(count, count), key=lambda batch: len(batch[0]))  # the first, but for unlike shapes
