"""`graphopt distill`: a student learns from teachers, and goes through passes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    Output,
    Plugin,
    Preset,
    Seed,
    Target,
    TensorBoardDirectory,
    Trust,
    Weights,
)
from graphopt.cli.delivering import check_or_fail, default_directory, directory_of_failure, pipeline_of, save
from graphopt.errors import UsageError
from graphopt.pipeline.registry import DEFAULT_TARGET

if TYPE_CHECKING:
    from graphopt.distillation.plan import DistillPlan


def command(
    student: Annotated[
        Path | None, typer.Argument(metavar="STUDENT", help="A .pt2 program, a module, or weights for --factory.")
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            help="A model file, an .onnx file, or module:function that returns a module (weights: @FILE behind it). "
            "Repeat for several."
        ),
    ] = None,
    data: Data = None,
    labels: Annotated[
        str | None, typer.Option(help="Labels of DATA, where it holds none: .npy, .npz or .safetensors.")
    ] = None,
    teacher_data: Annotated[
        str | None, typer.Option(help="What teachers take that is not the student's, sample by sample as DATA.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="A .toml file: what is taught, by which losses, how long.")] = None,
    preset: Preset = None,
    temperature: Annotated[
        float | None, typer.Option(help="Softens logits. Goes before the plan's, as those below.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Share of the teachers, the rest is the labels'.")] = None,
    features: Annotated[str | None, typer.Option(help="Values inside that are taught: auto, stages or none.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the samples.")] = None,
    passes: Annotated[
        str | None, typer.Option(help="What the trained student goes through: int8, say. Or a .toml file.")
    ] = None,
    evaluation: Evaluation = None,
    target: Target = None,
    output: Output = None,
    inputs: Input = None,
    dynamic: Dynamic = None,
    factory: Factory = None,
    weights: Weights = None,
    trust: Trust = False,
    plugin: Plugin = None,
    fail_if: FailIf = None,
    check: Check = "fast",
    bench: Bench = True,
    device: Device = None,
    cache: Cache = True,
    tensorboard: TensorBoardDirectory = None,
    seed: Seed = 0,
    format: Format = "text",
) -> None:
    """Train a student by what teachers and labels say, then optimise, lower, verify and time it."""
    from graphopt.cli.gates import Gate, check_measured
    from graphopt.cli.progress import TerminalProgress, logging_to
    from graphopt.job.distilling import distill
    from graphopt.job.result import check_place
    from graphopt.pipeline.registry import backends_named

    arguments.check_format(format)
    source = ModelArguments(
        model=student,
        data=data,
        inputs=inputs,
        dynamic=dynamic,
        factory=factory,
        weights=weights,
        trust=trust,
        seed=seed,
    )
    gates = [Gate.parse(text) for text in fail_if or ()]
    chosen = {"temperature": temperature, "alpha": alpha, "features": features, "epochs": epochs}
    wanted, preset_passes = _plan(plan, preset, {name: value for name, value in chosen.items() if value is not None})
    pipeline = pipeline_of(preset_passes if passes is None else passes, plugin or ())
    directory = output or default_directory(source)
    arguments.check_output(directory)
    backends = backends_named(target or [DEFAULT_TARGET])
    check_place(directory, backends)
    times = bench and any(item.times_here for item in backends)
    check_measured(gates, evaluates=evaluation is not None, lowers=bool(backends), times=times)
    may_fail = bool(gates) or any(step.instance.has_goal for step in pipeline.steps)
    failed = directory_of_failure(directory, expected=may_fail)
    progress = TerminalProgress()
    logged = logging_to(tensorboard, progress)
    program, samples = source.load()
    progress.done(f"{source.name}: loaded")
    result = distill(
        program,
        teacher,
        samples,
        wanted,
        labels=labels,
        teacher_data=teacher_data,
        eval=evaluation,
        passes=pipeline,
        target=backends,
        seed=seed,
        hooks=[progress],
        check=check,
        bench=bench,
        progress=logged,
        name=source.name,
        device=device,
        cache=cache,
        trust=trust,
    )
    check_or_fail(result, gates, directory, failed, format)
    save(result, directory, failed if may_fail else None, format)


def _plan(plan: Path | None, preset: str | None, chosen: dict[str, Any]) -> tuple[DistillPlan, str]:
    """Return what is taught, and the passes that a preset brings.

    Raises:
        UsageError: there is a plan and a preset, or the preset is no distillation's.
    """
    from graphopt.distillation.plan import DistillPlan
    from graphopt.pipeline.preset_files import preset_called

    if preset is None:
        fields = DistillPlan.of(plan).to_json()
        return DistillPlan.of({**fields, **chosen}), ""
    if plan is not None:
        raise UsageError(f"--preset {preset} brings its plan. Leave out --plan, or the preset.")
    found = preset_called(preset)
    if not found.plan:
        raise UsageError(f"The preset {preset} is none of a distillation: graphopt optimize MODEL --preset {preset}.")
    return DistillPlan.of({**found.plan, **chosen}), found.passes
