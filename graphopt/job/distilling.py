"""`graphopt.distill`: a student learns from teachers, then goes through passes and is lowered like any model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphopt.caching.digests import asks_the_user, digest_of, of_computing, of_program
from graphopt.caching.run_checkpoints import RunCheckpoints
from graphopt.caching.store import Store
from graphopt.capturing.load import with_data
from graphopt.capturing.model_calls import gradients_recorded
from graphopt.data import Samples
from graphopt.data.batches import Batch
from graphopt.data.sources import LABELS, open_file
from graphopt.distillation.beside import Beside
from graphopt.distillation.distilling import Distilled, distill_program
from graphopt.distillation.paired import open_teachers, with_new_head
from graphopt.distillation.plan import DistillPlan
from graphopt.distillation.synthesis import synthesised
from graphopt.distillation.teachers import GivenTeacher, Teacher, alike, by_name, by_name_and_place, check_inputs
from graphopt.distillation.weights import integer_weights, trainable
from graphopt.errors import DataError, UsageError, first_line
from graphopt.files import sha256
from graphopt.ir.devices import device_called, device_memory
from graphopt.ir.global_state import one_thread_at_a_time, random_state_kept
from graphopt.ir.program import Program
from graphopt.job.job import Job
from graphopt.job.judging import judge_of
from graphopt.job.result import Result
from graphopt.measure.evaluate import as_model
from graphopt.pipeline.context import Context, NoProgress, Progress
from graphopt.pipeline.hooks import Hook
from graphopt.pipeline.pass_base import Pass
from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.registry import DEFAULT_TARGET, PassRegistry, backends_named
from graphopt.targets.backend import Backend

_READ_SIZE = 256  # samples read at once


@one_thread_at_a_time()
@random_state_kept()
@gradients_recorded()
def distill(
    student: nn.Module | Program,
    teacher: GivenTeacher | Sequence[GivenTeacher] | None,
    data: Any,
    plan: DistillPlan | Mapping[str, Any] | str | Path | None = None,
    *,
    labels: Any = None,
    teacher_data: Any = None,
    eval: Any = None,
    passes: str | Sequence[Any] | Pipeline = "",
    target: str | Backend | Sequence[str | Backend] | None = DEFAULT_TARGET,
    seed: int = 0,
    dynamic_shapes: Any = None,
    plugins: Sequence[Path | str | type[Pass[Any, Any]]] = (),
    hooks: Sequence[Hook] = (),
    check: str = "fast",
    bench: bool = True,
    progress: Progress | None = None,
    name: str | None = None,
    device: str | torch.device | None = None,
    cache: bool = True,
    trust: bool = False,
) -> Result:
    """Teach a student what one or several teachers know, then optimise it.

    Args:
        student: a module (captured on the first samples of `data`) or a program, with the weights that it starts from.
            It is not changed.
        teacher: a module, a program, an artifact, the path of any of them or of an ONNX file, `module:function` that
            returns a module (with the file of its weights behind an `@`), or several of these; None where labels or
            the student itself teach.
        data: samples to learn on, labelled or not, as `optimize` takes them; None where the plan makes some up.
        plan: what is taught, and how: a `DistillPlan`, its fields, or the path of a TOML file.
        labels: of the samples of `data`: a tensor, an array, or the path of a file; None: those in `data`, if any.
        teacher_data: what teachers take whose inputs are not the student's, sample by sample the same.
        eval: as `optimize` takes it; the report says what it gives for student and teachers before, too.
        passes: what the trained student goes through then; "" only lowers it.
        target: what it is lowered to.
        seed: every random draw descends from it.
        dynamic_shapes: further dynamic axes of a module, as `capture` takes them.
        plugins: files or classes of passes.
        hooks: called around every pass.
        check: "fast" or "full", see `optimize`.
        bench: whether to time the artifact.
        progress: shows long loops.
        name: what the report calls the student.
        device: where it is trained and passes compute; None leaves the student where it is.
        cache: whether training is kept after each epoch, so that a killed run goes on there and one on the same
            things is not trained again, and plans of passes are.
        trust: let a teacher's file run code.

    Returns:
        A result whose `original` is the trained student, and which says in `distillation` how it was taught.

    Raises:
        GraphOptError: see its subclasses; nothing is left behind.
    """
    wanted = DistillPlan.of(plan)
    pipeline = Pipeline.parse(passes, PassRegistry(plugins))
    backends = backends_named(target)
    pipeline.check_targets(item.description for item in backends)
    progress = progress or NoProgress()
    data = _made_up(teacher, wanted, seed, progress, trust=trust) if data is None else data
    found, samples = with_data(student, data, dynamic_shapes, share_tensors=True)
    assert samples is not None
    home = found.device
    found = with_new_head(found.evaluated(), wanted, seed).to(home if device is None else device_called(device))
    _check_trainable(found)
    for item in backends:
        item.accepts(found.to("cpu"))
    if eval is not None:
        judge_of(eval, found, progress)  # what is wrong with it is said before anything is trained
    samples = samples.on(found.device)
    teachers = open_teachers(teacher, found, samples.first(2), wanted, teacher_data, trust=trust, seed=seed)
    beside = _beside(samples, labels, teacher_data, teachers, found, wanted)
    ctx = Context(found, seed=seed, progress=progress)
    kept = _checkpoints(found, teachers, beside, wanted, seed) if cache else None
    with device_memory():
        taught = distill_program(found, teachers, beside, wanted, replace(ctx, checkpoints=kept) if kept else ctx)
    job = Job(
        taught.program.to(home),
        samples,
        evaluation=eval,
        backends=backends,
        seed=seed,
        progress=progress,
        name=name or ("program" if isinstance(student, Program) else type(student).__name__),
        device=device,
        cache=cache,
    )
    outcome = job.run(pipeline, hooks=hooks, check=check)
    apart = wanted.apart(len(teachers), given=bool(beside.others))
    outcome.report.notes += _notes(taught, found, teachers, job, apart)
    result = job.deliver(outcome, bench=bench)
    result.distillation = taught.record
    return result


def _made_up(teacher: Any, plan: DistillPlan, seed: int, progress: Progress, *, trust: bool) -> torch.Tensor:
    """Return samples made up of what the first teacher knows of its data.

    Raises:
        DataError: the plan does not ask for them, so that data are missing.
        UsageError: nothing is known of a teacher's insides.
    """
    if plan.synthesised is None:
        raise DataError(
            "Distillation needs data to learn on, and none was given. Give --data samples.npz, or data=..., or say "
            "synthesised = 1024 in the plan for samples made up of the teacher's BatchNorms."
        )
    first = teacher[0] if isinstance(teacher, list | tuple) else teacher
    known = None if first is None else Teacher.open(first, data=None, trust=trust, seed=seed).program
    if known is None:
        raise UsageError("Samples are made up of what a teacher's graph holds: give one that is no artifact, or data.")
    return synthesised(known, plan.synthesised, Context(known, seed=seed).generator("distill/samples"), progress)


def _check_trainable(program: Program) -> None:
    frozen = integer_weights(program)
    if frozen or not trainable(program):
        why = f"its weight `{frozen[0]}` is stored as integers" if frozen else "it has no parameter with a gradient"
        raise UsageError(
            f"The student cannot be trained: {why}. Give the float model, and quantize it after: --passes."
        )


def _beside(
    samples: Samples,
    labels: Any,
    teacher_data: Any,
    teachers: Sequence[Teacher],
    student: Program,
    plan: DistillPlan,
) -> Beside:
    """Put labels and the inputs of teachers beside the samples."""
    others = []
    for teacher, apart in zip(teachers, plan.apart(len(teachers), given=teacher_data is not None), strict=True):
        if apart:
            names = [spec.name for spec in teacher.inputs]
            others.append(Samples.open(teacher_data, names).check(teacher.inputs).on(student.device))
        else:
            check_inputs(teacher, student.inputs, "the student")
    if teacher_data is not None and not others:
        raise UsageError("There are data of teachers, and no teacher takes them. Leave them out: --teacher-data.")
    given = _labels(labels)
    own = next(iter(samples.labelled_batches(2)))[1] is not None
    labelled = (given is not None or own) and (plan.alpha != 1 or plan.needs_labels)
    return Beside(samples, None if given is None else given.to(student.device), labelled, others)


def _labels(given: Any) -> torch.Tensor | None:
    """Return labels that come apart from the samples."""
    if given is None:
        return None
    if not isinstance(given, str | Path):
        try:
            found: torch.Tensor = torch.as_tensor(given)
        except (RuntimeError, TypeError, ValueError) as err:
            raise DataError(f"No tensor can be made of the labels: {first_line(err)}. Give numbers.") from err
        if not found.dim():
            raise DataError(f"The labels are a single value, {given!r}. Give one for each sample.")
        return found
    chunk = open_file(Path(given))
    columns = {**chunk.columns, **({"labels": chunk.labels} if chunk.labels is not None else {})}
    chosen = [key for key in LABELS if key in columns] or list(columns)
    if len(chosen) != 1 and not set(chosen) & set(LABELS):
        raise DataError(f"{given} holds {len(columns)} arrays, none of them called `labels`. Give a file of labels.")
    column = columns[chosen[0]]
    return column.read(0, column.shape[0])


def _checkpoints(
    student: Program, teachers: Sequence[Teacher], beside: Beside, plan: DistillPlan, seed: int
) -> RunCheckpoints | None:
    """Return where training is kept after each epoch, None where nothing tells whether another run is the same."""
    store = Store.of_user()
    programs = [student, *(teacher.program for teacher in teachers if teacher.program is not None)]
    if store is None or plan.functions or any(map(asks_the_user, programs)):
        return None
    files = [sha256(file) for teacher in teachers if teacher.artifact is not None for file in teacher.artifact.files]
    samples = [digest_of(batch) for batch in beside.batches(_READ_SIZE)]
    named = [teacher.name for teacher in teachers]  # in their order, whichever are programs
    return RunCheckpoints(
        store, digest_of(list(map(of_program, programs)), files, named, samples, plan.to_json(), seed, of_computing())
    )


def _answering(teacher: Teacher, student: Program) -> Callable[[Batch], Batch] | None:
    """Return what takes and gives what the student does; None: the teacher gives something else."""
    taken = check_inputs(teacher, student.inputs, "the student")
    given = by_name(student.outputs, teacher.outputs) or by_name_and_place(student.outputs, teacher.outputs) or []
    found = [teacher.outputs[at] for at in given]
    if len(found) != len(student.outputs) or not all(map(alike, found, student.outputs)):
        return None
    answer = teacher.whole()

    def call(batch: Batch) -> Batch:
        outputs = answer(tuple(batch[at] for at in taken))
        return tuple(outputs[at] for at in given)

    return call


def _notes(
    taught: Distilled, student: Program, teachers: Sequence[Teacher], job: Job, apart: Sequence[bool]
) -> list[str]:
    """Say who taught, and how the student was judged before, and the teachers that take the same."""
    losses = taught.record["held_out_losses"]
    assert isinstance(losses, list)
    said = f"held-out loss {losses[0]:.4g}, then at its lowest {min(losses):.4g}" if losses else ""
    notes = [f"distill: by {', '.join(teacher.name for teacher in teachers) or 'labels and itself'}: {said}"]
    notes += [f"distill: {refusal.site}: {refusal.reason}" for refusal in taught.refusals]
    if job.metric is not None:
        scores = [f"the student had {job.metric(student.to(job.original.device)):.2f} before"]
        for teacher, own in zip(teachers, apart, strict=True):
            answer = None if own else _answering(teacher, student)
            if answer is not None:
                scores.append(f"{teacher.name} has {job.metric(as_model(answer, student)):.2f}")
        notes.append(f"distill: of {job.metric.name} {', '.join(scores)}")
    return notes
