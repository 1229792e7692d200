"""Distilling: a student is trained by a plan, and what comes back is its own graph with what it learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from graphopt.data.batches import Batch
from graphopt.distillation.adversarial import ADVERSARIAL, adversarial
from graphopt.distillation.augment import LabelColumn, View, channel_axis, view_of
from graphopt.distillation.beside import Beside
from graphopt.distillation.history import History
from graphopt.distillation.label_losses import check_classes, of_classes
from graphopt.distillation.loop import DivergedError, Schedule, Trainer
from graphopt.distillation.plan import DistillPlan
from graphopt.distillation.pool import Pool
from graphopt.distillation.preparing import PreparedLesson, prepare
from graphopt.distillation.statistics import batch_norms, fewest_samples
from graphopt.distillation.taps import output_values
from graphopt.distillation.teachers import Teacher
from graphopt.distillation.teaching import Teaching
from graphopt.distillation.trials import RateTrials
from graphopt.distillation.weights import overwrite
from graphopt.errors import DataError, PassError, UsageError
from graphopt.ir.plain_data import Json
from graphopt.ir.program import Program
from graphopt.pipeline.context import Context
from graphopt.pipeline.plan import Refusal

_RATE_WITH_BATCH_NORM = 0.03
# Without, the best of several in a few steps, scaled: networks for digits, drawn or trained, did best at 0.1 for 54 and
# for 270 steps, three layers of MiniLM at 0.01 for 32.
_RATES, _GROWTH = (0.1, 0.03, 0.01, 0.003, 0.001), 0.5
_AGREED = 1e-6  # loss of a student that has nothing to learn


@dataclass(frozen=True)
class Distilled:
    """What a student became.

    Attributes:
        program: its own graph, with the tensors that it learned.
        record: the plan, who taught what and how, and the held-out losses, as plain data.
        refusals: what was looked for and was not taught.
    """

    program: Program
    record: dict[str, Json]
    refusals: tuple[Refusal, ...]


def distill_program(
    student: Program,
    teachers: Sequence[Teacher],
    data: Beside,
    plan: DistillPlan,
    ctx: Context,
) -> Distilled:
    """Train a student by a plan; it is not changed.

    Args:
        student: in evaluation mode, with a floating parameter that has a gradient.
        teachers: where the student is.
        data: the samples, with labels and teachers' inputs beside them.
        plan: what is taught, and how.
        ctx: gives randomness and shows progress.

    Raises:
        UsageError: the plan does not fit the student and its teachers.
        DataError: samples or labels are missing, or do not fit.
        PassError: training diverged, or there is nothing to learn.
    """
    apart = plan.apart(len(teachers), given=bool(data.others))
    ctx = ctx.with_data(data)
    training = Pool.read(ctx.need_samples("distill", "to learn from"), plan.samples)
    held = Pool.read(ctx.need_held_out("distill"), None)
    found = prepare(
        plan,
        student,
        teachers,
        ctx.generator("distill/adapters"),
        labelled=data.labelled,
        labels=training.buckets[0][len(student.inputs)] if data.labelled else None,
        apart=apart,
    )
    column = _label_column(found, student, (training, held))
    views = _views(plan, student, column, apart=any(apart))
    view = view_of([name for name in views if name != ADVERSARIAL], student, column)
    history, rates = _trained(plan, found, training, held, views, view, ctx)
    program = student.copy(share_tensors=False)
    own = program.state_dict()
    overwrite(program, {name: tensor for name, tensor in history.best.items() if name in own})
    refusals = list(found.refusals)
    if not history.best:
        reason = f"no epoch was better on {held.count} held-out samples: it is as it was"
        refusals.append(Refusal("student", reason, "no epoch was better"))
    if reason := training.left_out(fewest_samples(student)):
        refusals.append(Refusal("samples", reason))
    if history.stopped:
        refusals.append(Refusal("training", f"it ended early: {history.stopped}", "it ended early"))
    record: dict[str, Json] = {
        "plan": plan.to_json(),
        "teachers": [teacher.name for teacher in teachers],
        **found.said,
        "views": list(views),
        **rates,
        "held_out_losses": list(history.losses),
    }
    return Distilled(program, record, tuple(refusals))


def _trained(
    plan: DistillPlan,
    found: PreparedLesson,
    training: Pool,
    held: Pool,
    views: Sequence[str],
    view: View,
    ctx: Context,
) -> tuple[History, dict[str, Json]]:
    """Train by the plan; return what became of it, and the rate with those that were tried."""
    student, lesson = found.student, found.lesson
    batch_size = student.takes(plan.batch_size)
    if not views:
        lesson.place(student.device)
        lesson, (training, held) = lesson.remembered([training, held], batch_size, student.device)
    if plan.parts > 1 and student.batch_size is not None:
        raise UsageError(
            f"The student takes {student.batch_size} samples at a time, and parts = {plan.parts} divides those of a "
            "step. Leave it out, or capture the student with a dynamic batch."
        )
    if ADVERSARIAL in views:
        view = adversarial(view, student, lesson)
    lesson, held, view = _counted(lesson, held, view)
    if batch_size < fewest_samples(student):
        raise UsageError(
            "The student takes one sample at a time, and BatchNorm cannot be trained on single samples. Capture it "
            "with a dynamic batch."
        )
    trainer = Trainer(student, lesson, held, batch_size, precision=plan.precision)
    start = trainer.held_out_loss()
    _check_start(start, held.count, labelled=lesson.labels is not None)
    rate = plan.lr or (_RATE_WITH_BATCH_NORM if batch_norms(student) else _RATES[0])
    schedule = Schedule(
        plan.epochs, rate, patience=plan.patience, parts=plan.parts, clip=plan.clip, average=plan.average
    )

    def draws(purpose: str) -> torch.Generator:
        return ctx.generator(f"distill/{purpose}")

    def fit(schedule: Schedule, stage: str) -> History:
        stage = f"distill: {stage}"
        try:
            return trainer.fit(training, schedule, view, draws, ctx.progress, stage=stage, checkpoints=ctx.checkpoints)
        except DivergedError as err:
            return History([math.inf], stopped=str(err))

    trials = RateTrials(fit, student, schedule, trainer.steps_per_epoch(training))
    if plan.lr is None and not batch_norms(student):
        schedule = trials.choose(_RATES, _GROWTH)
    tried: list[Json] = [{**one, "loss": _finite(one["loss"])} for one in trials.tried]
    history = fit(schedule, "training")
    if history.losses == [math.inf] and not trials.best:
        raise PassError(history.stopped)
    if trials.best and trials.lowest < min(history.losses):
        history = History([start, trials.lowest], trials.best, stopped=history.stopped)
    return history, {"lr": schedule.rate, "tried": tried}


def _finite(loss: Json) -> Json:
    return loss if isinstance(loss, float) and math.isfinite(loss) else None  # JSON has no infinity


def _counted(lesson: Teaching, held: Pool, view: View) -> tuple[Teaching, Pool, View]:
    """Put how many labels there are for a sample behind a batch, so that its parts know what the mean of it is over."""
    term = lesson.labels
    if term is None or term.loss.name != "cross_entropy":
        return lesson, held, view

    def counting(batch: Batch, generator: torch.Generator) -> Batch:
        batch = view(batch, generator)
        return (*batch, term.loss.density([batch[term.column]]))

    density = term.loss.density([bucket[term.column] for bucket in held.buckets])
    held = Pool(tuple((*bucket, density) for bucket in held.buckets))
    return lesson.relabelled(lambda one: replace(one, counted=True)), held, counting


def _check_start(loss: float, count: int, *, labelled: bool) -> None:
    if not math.isfinite(loss):
        raise PassError(
            f"Distillation cannot start: the loss on {count} held-out samples is {loss}. The student or a teacher "
            "computes values that are not finite on this data."
        )
    if loss <= _AGREED and not labelled:
        raise UsageError(
            f"The student gives what its teacher gives already (a loss of {loss:.2g} on {count} held-out samples): "
            "there is nothing to learn. Give another student, or labels."
        )


def _label_column(found: PreparedLesson, student: Program, pools: Sequence[Pool]) -> LabelColumn | None:
    """Say where labels are, after a look at all of them; those of classes stay so when they are mixed."""
    term = found.lesson.labels
    if term is None:
        return None
    labels = [[bucket[term.column] for bucket in pool.buckets] for pool in pools]
    first = labels[0][0]
    sizes = (len(first), *output_values(student)[term.loss.target.index].meta["val"].shape[1:])
    axis, axes = term.loss.axis_in(sizes, first), first.dim()
    classes = None if axis is None else sizes[axis]
    if axis is None or not isinstance(classes, int) or term.loss.name == "mse":
        return LabelColumn(term.column, axes=axes)
    if term.loss.function is not None:
        known = all(of_classes(classes, part) for parts in labels for part in parts)
        return LabelColumn(term.column, classes if known else None, axis, axes)
    loss = replace(term.loss, name="cross_entropy")
    for pool, parts in zip(("learn from", "judge by"), labels, strict=True):
        for part in parts:
            check_classes(classes, part)
        if not loss.density(parts):
            raise DataError(f"Of the samples to {pool} none has a label: all are -100, and left out. Give others.")
    found.lesson.labels = replace(term, loss=loss)
    found.lesson.heads = [replace(head, loss=replace(head.loss, name="cross_entropy")) for head in found.lesson.heads]
    return LabelColumn(term.column, classes, axis, axes)


def _views(plan: DistillPlan, student: Program, labels: LabelColumn | None, *, apart: bool) -> tuple[str, ...]:
    """Return the names of the views, each once; by itself none where labels may say where something is.

    Raises:
        UsageError: the plan asks for views of what is no image, or that a teacher would not see.
    """
    named = tuple(dict.fromkeys(name for name in plan.augment if name != "auto"))
    first, of_images = student.inputs[0], [name for name in named if name != ADVERSARIAL]
    if named and apart:
        raise UsageError(
            f'The plan says augment = "{named[0]}", which a teacher of other inputs would not see. Say augment = [].'
        )
    if of_images and len(first.shape) != 4:
        raise UsageError(
            f'The plan says augment = "{of_images[0]}", which changes images, and the first input is {first}. Say '
            "augment = []."
        )
    if ADVERSARIAL in named and not first.dtype.is_floating_point:
        raise UsageError(f'The plan says augment = "{ADVERSARIAL}", and {first} has no gradient. Say augment = [].')
    moving = [name for name in of_images if name != "mixup"]
    if moving and labels is not None and labels.axes > 2:
        raise UsageError(
            f'The plan says augment = "{moving[0]}", which moves what is in images, and labels of {labels.axes} axes '
            'say where it is: they would not move with it. Say augment = [], or ["mixup"].'
        )
    placeless = labels is None or (labels.classes is not None and labels.axes == 1)
    if "auto" in plan.augment and placeless and not apart and channel_axis(student):
        return tuple(dict.fromkeys(("flip", "shift", *named)))
    return named
