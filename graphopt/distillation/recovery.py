"""Recovering a student in stages, each of which keeps what brings it closer to its teacher on held-out inputs.

statistics     BatchNorm's running mean and variance are re-estimated
blocks         every block learns by itself to give what the teacher's gives, see `blocks`
end-to-end     all of it learns together, at a rate that a few steps of each were tried for
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from graphopt.distillation.addresses import Tap
from graphopt.distillation.augment import View
from graphopt.distillation.blocks import BlockLesson, boundaries, separated
from graphopt.distillation.history import History
from graphopt.distillation.lesson import Imitation
from graphopt.distillation.loop import DivergedError, Precision, Schedule, Trainer
from graphopt.distillation.objective import Objective
from graphopt.distillation.pool import Pool
from graphopt.distillation.statistics import batch_norms, fewest_samples
from graphopt.distillation.taps import insert_taps
from graphopt.distillation.trials import RateTrials
from graphopt.distillation.weights import floating, overwrite, snapshot
from graphopt.errors import PassError
from graphopt.ir.graph import arguments
from graphopt.ir.operators import DROPOUTS, RECURRENT_LAYERS
from graphopt.ir.plain_data import Json
from graphopt.ir.program import Program
from graphopt.ir.training import set_argument
from graphopt.pipeline.context import Context

Stage = Literal["statistics", "blocks", "end-to-end"]

_BLOCK_RATE = 0.01  # at most
_BLOCK_SHARE = 4  # blocks are trained for one in so many epochs
_AGREED = 1e-6  # held-out loss of a program that has nothing to recover


@dataclass
class Recovery:
    """What a recovery found.

    Attributes:
        tensors: the tensors with the lowest held-out loss, by name; empty if those that came in are the best.
        before: held-out loss of what came in.
        after: held-out loss of `tensors`.
        stages: what each did: its name, the held-out loss after it, whether it is kept, and how it trained.
        seconds: that each took.
        left: why a stage was left out, or the program is as it was, by what was left.
    """

    before: float
    after: float
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    stages: list[dict[str, Json]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Material:
    """What a student is trained on.

    Attributes:
        training: samples to train on.
        held: samples to judge by.
        batch_size: samples per step.
        view: makes a new view of a batch.
    """

    training: Pool
    held: Pool
    batch_size: int
    view: View


def recover(
    student: Program,
    teacher: Program,
    objective: Objective,
    material: Material,
    schedule: Schedule,
    rates: Sequence[float],
    ctx: Context,
    *,
    by: str,
    stages: Sequence[Stage],
    precision: Precision,
) -> Recovery:
    """Bring `student` closer to `teacher`; neither is changed.

    Args:
        student: what to recover, without taps.
        teacher: what to imitate, without taps.
        objective: how, and at which taps.
        material: what to train on.
        schedule: how long to train; no epochs: only BatchNorm statistics are re-estimated.
        rates: from high to low; the best in a few steps is trained at.
        ctx: gives randomness, shows progress and keeps checkpoints.
        by: the pass.
        stages: which are tried.
        precision: what products are computed in.

    Raises:
        PassError: the loss is not finite before training.
    """
    own = _without_noise(_tapped(student, [Tap(pair.teacher.address, pair.student.node) for pair in objective.pairs]))
    taught = _tapped(teacher, [pair.teacher for pair in objective.pairs])
    trainer = Trainer(own, Imitation(taught, objective), material.held, material.batch_size, precision=precision)
    lowest = trainer.held_out_loss()
    found = Recovery(before=lowest, after=lowest)
    if not math.isfinite(lowest):
        raise PassError(
            f"Pass `{by}` cannot start: the loss on {material.held.count} held-out samples is {lowest}. The program "
            "or the unoptimised one computes values that are not finite on this data."
        )
    if lowest <= _AGREED:
        found.left["program"] = "outputs already agree: there is nothing to recover"
        return found
    if reason := material.training.left_out(fewest_samples(own)):
        found.left["samples"] = reason
    run = _Run(own, trainer, material, ctx, found, by)
    if "statistics" in stages:
        run.estimate("statistics")
    if "blocks" in stages and schedule.epochs:
        taps = boundaries(own, taught, objective)
        if taps:
            lesson = BlockLesson(taught, objective, taps)
            run.train_blocks(lesson, dataclasses.replace(schedule, rate=min(schedule.rate, _BLOCK_RATE)), precision)
        elif objective.pairs:
            found.left["blocks"] = "no value between blocks has the shape it had: they cannot be given what it was"
    if "end-to-end" in stages and schedule.epochs:
        run.train(schedule, rates)
        if "statistics" in stages and found.stages[-1]["kept"]:
            run.estimate("statistics after")
    if not found.tensors:
        reason = f"the loss on {material.held.count} held-out samples stays {lowest:.4g}"
        found.left["program"] = f"nothing tried is better: {reason}"
    return found


@dataclass
class _Run:
    """The stages of one recovery; the student holds the best tensors between them."""

    student: Program
    trainer: Trainer
    material: Material
    ctx: Context
    found: Recovery
    by: str

    def estimate(self, stage: str) -> None:
        """Re-estimate BatchNorm statistics."""
        nodes = batch_norms(self.student)
        if not nodes:
            return
        names = [str(node.args[at].target) for node in nodes for at in (3, 4)]  # type: ignore[union-attr]
        former, began = snapshot(self.student, names), time.perf_counter()
        statistics = self.trainer.estimate(self.material.training, self._draws)
        if not self._judge(stage, began, self.trainer.held_out_loss(), statistics):
            overwrite(self.student, former)

    def train_blocks(self, lesson: BlockLesson, schedule: Schedule, precision: Precision) -> None:
        """Train every block by itself, for a part of the epochs, BatchNorm as it is."""
        began, start = time.perf_counter(), floating(self.student)
        apart, material = separated(self.student, lesson.taps), self.material
        judge = self.trainer.held_out_loss
        trainer = Trainer(apart, lesson, material.held, material.batch_size, precision=precision, judge=judge)
        schedule = dataclasses.replace(schedule, epochs=max(1, schedule.epochs // _BLOCK_SHARE), frozen=True)
        history = self._fit(trainer, schedule, lesson.view_of(material.view), "blocks")
        overwrite(self.student, history.best or start)
        more: dict[str, Json] = {"blocks": len(lesson.taps) + 1, "rate": schedule.rate, **_noted(history)}
        self._judge("blocks", began, min(history.losses), history.best, **more)

    def train(self, schedule: Schedule, rates: Sequence[float]) -> None:
        """Train all of it."""

        def fit(schedule: Schedule, stage: str) -> History:
            return self._fit(self.trainer, schedule, self.material.view, stage)

        began = time.perf_counter()
        trials = RateTrials(fit, self.student, schedule, self.trainer.steps_per_epoch(self.material.training))
        chosen = dataclasses.replace(schedule, rate=rates[0]) if len(rates) == 1 else trials.choose(rates)
        history = fit(chosen, "training")
        # of one loss and the tensors that have it
        lowest, best = min((min(history.losses), history.best), (trials.lowest, trials.best), key=lambda pair: pair[0])
        overwrite(self.student, best or trials.start)
        more: dict[str, Json] = {"rate": chosen.rate, "frozen": chosen.frozen, "tried": trials.tried}
        self._judge("end-to-end", began, lowest, best, **more, **_noted(history))

    def _draws(self, purpose: str) -> torch.Generator:
        return self.ctx.generator(f"{self.by}/{purpose}")

    def _fit(self, trainer: Trainer, schedule: Schedule, view: View, stage: str) -> History:
        ctx, training = self.ctx, self.material.training
        label = f"{self.by}: {stage}"
        try:
            return trainer.fit(
                training, schedule, view, self._draws, ctx.progress, stage=label, checkpoints=ctx.checkpoints
            )
        except DivergedError as err:
            return History([math.inf], stopped=str(err))

    def _judge(self, stage: str, began: float, loss: float, tensors: dict[str, torch.Tensor], **more: Json) -> bool:
        """Note what a stage won, and keep its tensors if it won something."""
        kept = loss < self.found.after and bool(tensors)
        if not math.isfinite(loss) and "stopped" in more:
            self.found.left[stage] = str(more["stopped"])
        if kept:
            self.found.after = loss
            self.found.tensors.update(tensors)
        self.found.seconds[stage] = time.perf_counter() - began
        self.found.stages.append({"stage": stage, "loss": loss if math.isfinite(loss) else None, "kept": kept, **more})
        return kept


def _noted(history: History) -> dict[str, Json]:
    noted: dict[str, Json] = {"epochs": history.losses[1:]}
    return {**noted, "stopped": history.stopped} if history.stopped else noted


def _without_noise(program: Program) -> Program:
    """Switch Dropout off for good, in place: a student that draws at random cannot imitate a teacher that does not."""
    for node in program.graph.nodes:
        name = "p" if node in DROPOUTS else "dropout" if node in RECURRENT_LAYERS else None
        if name is not None and name in arguments(node, (name,)):
            set_argument(node, name, 0.0)
    program.graph_module.recompile()
    return program


def _tapped(program: Program, taps: Sequence[Tap]) -> Program:
    return insert_taps(program, taps).copy(share_tensors=False)
