"""Recovering a student: re-estimate, train, and keep whatever is closest to the teacher on held-out inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from graphopt.distillation.addresses import Tap
from graphopt.distillation.augment import View
from graphopt.distillation.lesson import Imitation
from graphopt.distillation.loop import DivergedError, History, Schedule, Trainer
from graphopt.distillation.objective import Objective
from graphopt.distillation.pool import Pool
from graphopt.distillation.statistics import batch_norms
from graphopt.distillation.taps import insert_taps
from graphopt.distillation.weights import overwrite, snapshot
from graphopt.errors import PassError
from graphopt.ir.program import Program
from graphopt.pipeline.context import Context

_AGREED = 1e-6  # held-out loss of a program that has nothing to recover


@dataclass
class Recovery:
    """What a recovery found.

    Attributes:
        tensors: the tensors with the lowest held-out loss, by name; empty if those that came in are the best.
        losses: held-out losses, in the order they were measured: "before", "statistics", "epochs", "after".
        refusal: why nothing is kept, "" otherwise.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    losses: dict[str, float | list[float]] = field(default_factory=dict)
    refusal: str = ""


def recover(
    student: Program,
    teacher: Program,
    objective: Objective,
    training: Pool,
    held: Pool,
    batch_size: int,
    schedule: Schedule,
    rates: Sequence[float],
    view: View,
    ctx: Context,
) -> Recovery:
    """Bring `student` closer to `teacher`; neither is changed.

    Args:
        student: what to recover, without taps.
        teacher: what to imitate, without taps.
        objective: how, and at which taps.
        training: samples to train on.
        held: samples to judge by.
        batch_size: samples per step.
        schedule: how long to train; no epochs: only BatchNorm statistics are re-estimated.
        rates: learning rates, each tried only if the one before made nothing better.
        view: makes a new view of a batch.
        ctx: gives randomness and shows progress.

    Raises:
        PassError: the loss is not finite, before training or at the last rate.
    """
    own = _tapped(student, [Tap(pair.teacher.address, pair.student.node) for pair in objective.pairs])
    lesson = Imitation(_tapped(teacher, [pair.teacher for pair in objective.pairs]), objective)
    trainer = Trainer(own, lesson, held, batch_size)
    lowest = trainer.held_out_loss()
    found = Recovery(losses={"before": lowest})
    if not math.isfinite(lowest):
        raise PassError(
            f"Pass `recover` cannot start: the loss on {held.count} held-out samples is {lowest}. The program or the "
            "unoptimised one computes values that are not finite on this data."
        )
    if lowest <= _AGREED:
        found.refusal = "outputs already agree: there is nothing to recover"
        return found
    lowest = _estimated(trainer, own, training, found, "statistics", lowest)
    if schedule.epochs:

        def train(rate: float) -> History:
            batches = ctx.generator("recover/batches")
            with torch.random.fork_rng(devices=[]):  # Dropout draws from torch's own generator
                torch.manual_seed(ctx.generator("recover/dropout").initial_seed())
                return trainer.fit(training, schedule, rate, view, batches, ctx.progress)

        history, rate = _first_that_helps(train, rates, own)
        found.losses.update({"epochs": history.losses[1:], "lr": rate})
        if history.best:
            overwrite(own, history.best)
            found.tensors = history.best
            lowest = _estimated(trainer, own, training, found, "after", min(history.losses))
    if not found.tensors:
        found.refusal = f"nothing tried is better: the loss on {held.count} held-out samples stays {lowest:.4g}"
    return found


def _first_that_helps(
    train: Callable[[float], History], rates: Sequence[float], student: Program
) -> tuple[History, float]:
    """Train at one rate after the other, each from the same weights, until an epoch is better than what came in."""
    start = snapshot(student, [name for name, tensor in student.state_dict().items() if tensor.is_floating_point()])
    for rate in rates[:-1]:
        try:
            history = train(rate)
        except DivergedError:
            history = History([])
        if history.best:
            return history, rate
        overwrite(student, start)
    return train(rates[-1]), rates[-1]


def _estimated(trainer: Trainer, student: Program, inputs: Pool, found: Recovery, label: str, lowest: float) -> float:
    """Re-estimate the BatchNorm statistics, keep them if the held-out loss falls, and return the lowest loss."""
    names = [str(node.args[at].target) for node in batch_norms(student) for at in (3, 4)]  # type: ignore[union-attr]
    if not names:
        return lowest
    former = snapshot(student, names)
    statistics = trainer.estimate(inputs)
    loss = trainer.held_out_loss()
    found.losses[label] = loss
    if loss < lowest:
        found.tensors = {**found.tensors, **statistics}
        return loss
    overwrite(student, former)
    return lowest


def _tapped(program: Program, taps: Sequence[Tap]) -> Program:
    return insert_taps(program, taps).copy(share_tensors=False)
