"""The training loop, under Accelerate: where the program is or, started by `accelerate launch`, in many processes.

The one adapter to `accelerate`, which is imported when a loop starts and not before. Every process draws the same
batches and views and computes its share of each, so a run takes the same steps however many there are. What is drawn
depends on the step alone, so a run that goes on where another was killed takes the same steps, too.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from graphopt.data.batches import Batch, batch_count, taken
from graphopt.distillation.augment import View
from graphopt.distillation.history import Averages, History, packed, unpack
from graphopt.distillation.lesson import Lesson
from graphopt.distillation.optimizer import RelativeAdamW
from graphopt.distillation.pool import Index, Pool
from graphopt.distillation.statistics import batch_norms, estimate_statistics, fewest_samples
from graphopt.distillation.weights import floating, keep_zeros, overwrite, snapshot
from graphopt.errors import DataError, PassError
from graphopt.ir.placing import place
from graphopt.ir.program import Program
from graphopt.ir.training import set_training
from graphopt.pipeline.checkpoints import Checkpoints, NoCheckpoints, State
from graphopt.pipeline.context import Progress

if TYPE_CHECKING:
    from accelerate import Accelerator

Draws = Callable[[str], torch.Generator]  # a generator that depends on what it is for alone
Precision = Literal["float32", "bfloat16"]

_ESTIMATED_ON = 8192  # samples, at most
_CHECKED = 32  # steps; the loss of so many is looked at together, since looking waits for the device


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long to train, and by which steps.

    Attributes:
        epochs: passes over the samples.
        rate: the largest step, as a fraction of the root mean square of each tensor.
        warmup: fraction of all steps in which the rate rises from 0; it falls to 0 as a cosine after.
        steps: taken at most; None: those of all epochs.
        patience: epochs without a lower held-out loss before stopping; None: the rate falls to the end, as it should.
        parts: that the samples of a step are computed in, one after the other, for less memory.
        clip: norm that all gradients together are scaled down to; None: as they are.
        average: of the weights, the share that a step keeps of those before; None: the weights themselves are judged.
        frozen: whether BatchNorm normalises by the statistics it has, not by those of each batch.
    """

    epochs: int
    rate: float
    warmup: float = 0.1
    steps: int | None = None
    patience: int | None = None
    parts: int = 1
    clip: float | None = None
    average: float | None = None
    frozen: bool = False

    def total(self, per_epoch: int) -> int:
        """Return how many steps are taken."""
        total = self.epochs * per_epoch
        return total if self.steps is None else min(total, self.steps)

    def rate_at(self, at: int, total: int) -> float:
        """Return the rate of a step."""
        rising = max(1, round(self.warmup * total))
        if at < rising:
            return self.rate * (at + 1) / rising
        return self.rate * 0.5 * (1 + math.cos(math.pi * (at - rising) / max(1, total - rising)))


class DivergedError(PassError):
    """Training reached a loss that is not finite, and no epoch before was better than what came in."""


class Trainer:
    """Trains a student program by a lesson, and judges it on samples it never trains on.

    Args:
        student: with the outputs that the lesson reads, owning its tensors; trained in place, where it is, or where
            Accelerate puts each process.
        lesson: what is learned.
        held_out: what the student is judged on.
        batch_size: over all processes.
        precision: what training computes products in; weights, steps and what is judged stay float32.
        judge: judges the student instead, lower is better; called with the student in evaluation mode.
    """

    def __init__(
        self,
        student: Program,
        lesson: Lesson,
        held_out: Pool,
        batch_size: int,
        *,
        precision: Precision = "float32",
        judge: Callable[[], float] | None = None,
    ) -> None:
        self._accelerator, self._device = _accelerator(student.device)
        self._student, self._lesson = student, lesson
        self._held_out, self._batch_size, self._precision = held_out, batch_size, precision
        self._judge = judge or self.held_out_loss
        place(student.graph_module, self._device)
        lesson.place(self._device)
        keep_zeros(student)
        self._expected: list[Any] = []
        self._fewest = fewest_samples(student)

    def held_out_loss(self) -> float:
        """Return what the student is judged by on the held-out samples, in evaluation mode."""
        self._student.eval()
        indices = self._held_out.batches(self._batch_size, takes=self._student.takes)
        chunks = [self._on_device(self._held_out.take(index)) for index in indices]
        with torch.no_grad():
            self._expected = self._expected or [self._lesson.wanted(chunk) for chunk in chunks]
            losses = [
                self._lesson.judged(self._student.call_flat(self._own(chunk)), wanted, chunk) * batch_count(chunk)
                for chunk, wanted in zip(chunks, self._expected, strict=True)
            ]
        mean = torch.stack(losses).sum() / sum(batch_count(chunk) for chunk in chunks)
        # Statistics of BatchNorm differ between processes while training: all must decide alike.
        return float(self._accelerator.reduce(mean, "mean"))

    def estimate(self, inputs: Pool, draws: Draws) -> dict[str, torch.Tensor]:
        """Re-estimate the student's BatchNorm statistics on `inputs`, put them in place and return them.

        Where there are many, on some that are drawn: a mean and a variance of each channel are all that is looked for.
        """
        self._student.eval()
        indices = self._batches(inputs)
        if inputs.count > _ESTIMATED_ON:
            indices = self._batches(inputs, draws("statistics"))[: math.ceil(_ESTIMATED_ON / self._batch_size)]
        found = estimate_statistics(self._student, (self._own(self._on_device(inputs.take(one))) for one in indices))
        overwrite(self._student, found)
        return snapshot(self._student, list(found))

    def steps_per_epoch(self, inputs: Pool) -> int:
        """Return how many steps one pass over samples takes.

        Raises:
            DataError: no samples make a batch.
        """
        steps = len(self._batches(inputs))
        if not steps:
            why = "BatchNorm cannot be trained on single ones" if self._fewest > 1 else "the program takes more at once"
            raise DataError(
                f"Of {inputs.count} samples, by their shapes {len(inputs.buckets)} kinds, no two make a batch to train "
                f"on, and {why}. Give more of the same shape."
            )
        return steps

    def fit(
        self,
        inputs: Pool,
        schedule: Schedule,
        view: View,
        draws: Draws,
        progress: Progress,
        *,
        stage: str = "training",
        checkpoints: Checkpoints | None = None,
    ) -> History:
        """Train on `inputs`; keep the tensors of the epoch with the lowest held-out loss.

        Args:
            inputs: what to train on.
            schedule: how long, and by which steps.
            view: makes a new view of each batch.
            draws: draws batches and views, and what the student draws itself.
            progress: shows the steps.
            stage: what progress and checkpoints are called.
            checkpoints: keep where training is after each epoch; it goes on there. None keeps nothing.

        Raises:
            DivergedError: the loss is not finite, and no epoch was better before.
            DataError: no samples make a batch.
        """
        checkpoints = checkpoints or NoCheckpoints()
        per_epoch = self.steps_per_epoch(inputs)
        total = schedule.total(per_epoch)
        with self._prepared(schedule) as steps, self._random_state_kept():
            history, start = self._resumed(steps, checkpoints.load(stage)) or (History([self._judge()]), 0)
            indices = self._drawn(inputs, draws, start // per_epoch, 0 if history.stopped else total - start)
            for at, index in enumerate(progress.track(indices, stage, total - start), start + 1):
                if (at - 1) % per_epoch == 0:
                    self._learn(schedule)
                torch.manual_seed(draws(f"noise {at}, {self._accelerator.process_index}").initial_seed())
                self._step(steps, view(self._on_device(inputs.take(index)), draws(f"view {at}")), at - 1, total)
                ends = at % per_epoch == 0 or at == total
                if ends or at % _CHECKED == 0:
                    told = {"loss": self._mean_loss(steps), "rate": schedule.rate_at(at - 1, total)}
                    if ends and math.isfinite(told["loss"]):
                        told["held-out loss"] = self._keep(steps, history, at, checkpoints, stage)
                    if self._accelerator.is_main_process:
                        progress.numbers(stage, at, told)
                    self._check(told, history, at, schedule)
                if history.stopped:
                    break
        return history

    @contextlib.contextmanager
    def _prepared(self, schedule: Schedule) -> Iterator[_Steps]:
        """Yield what takes steps."""
        parameters = [
            parameter for parameter in self._student.parameters() if parameter.requires_grad and parameter.numel()
        ]
        optimizer = RelativeAdamW(parameters, schedule.rate)
        averages = None if schedule.average is None else Averages(parameters, schedule.average)
        module, prepared = self._accelerator.prepare(_Module(self._student), optimizer)
        try:
            yield _Steps(schedule, parameters, module, prepared, averages)
        finally:
            self._student.eval()
            # One that has forgotten them: hooks of a wrapped module would fire again in the next training. To let it
            # free its memory collects all garbage of the process first, a third of a second each time.
            self._accelerator, _ = _accelerator(self._student.device)

    @contextlib.contextmanager
    def _random_state_kept(self) -> Iterator[None]:
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # Dropout draws from torch's own generators
            yield

    def _resumed(self, steps: _Steps, state: State | None) -> tuple[History, int] | None:
        """Go on from a state, if all processes have the same."""
        at = torch.tensor(-1 if state is None else int(str(state[0]["step"])), device=self._device)
        if state is None or len(self._accelerator.gather(at).unique()) > 1:
            return None
        return unpack(state, self._student, steps.optimizer, steps.averages)

    def _learn(self, schedule: Schedule) -> None:
        """Put the student in training mode."""
        spared = batch_norms(self._student) if schedule.frozen else []
        set_training(self._student.graph_module, True, spared=spared)

    def _step(self, steps: _Steps, batch: Batch, at: int, total: int) -> None:
        """Take one step on this process's share of a batch."""
        schedule, optimizer = steps.schedule, steps.optimizer
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate_at(at, total)
        optimizer.zero_grad()
        parts, losses = self._shares(batch, schedule.parts), []
        for number, (part, share) in enumerate(parts, start=1):
            last = number == len(parts)
            with contextlib.nullcontext() if last else self._accelerator.no_sync(steps.module):
                with torch.no_grad(), self._precise():
                    wanted = self._lesson.wanted(part)
                with self._precise():
                    loss = share * self._lesson.loss(steps.module(self._own(part)), wanted, part)
                self._accelerator.backward(loss)
            losses.append(loss.detach())
        steps.losses.append(losses)
        if schedule.clip is not None:
            self._accelerator.clip_grad_norm_(steps.parameters, schedule.clip)
        optimizer.step()
        if steps.averages is not None:
            steps.averages.follow(at)

    @staticmethod
    def _check(told: Mapping[str, float], history: History, at: int, schedule: Schedule) -> None:
        """Stop where a loss is not finite."""
        wrong = [name for name, value in told.items() if not math.isfinite(value)]
        if wrong:
            history.stopped = f"the {wrong[0]} was no longer finite after {at} steps"
        if wrong and not history.best:
            raise DivergedError(
                f"Training diverged: the {wrong[0]} is not finite after {at} steps. Try a tenth of the rate "
                f"(lr={schedule.rate / 10:g}), and look for samples that are not finite."
            )

    def _mean_loss(self, steps: _Steps) -> float:
        """Return the mean over the steps since this was last asked, and over all processes, which stop together."""
        found = self._accelerator.reduce(
            torch.stack([torch.stack(parts).sum() for parts in steps.losses]).mean(), "mean"
        )
        steps.losses.clear()
        return float(found)

    def _keep(self, steps: _Steps, history: History, at: int, checkpoints: Checkpoints, stage: str) -> float:
        """Judge an epoch, copy the tensors if it is the best so far, and keep where training is.

        Returns:
            The held-out loss; where it is not finite nothing is kept.
        """
        with steps.averages.in_place() if steps.averages is not None else contextlib.nullcontext():
            loss = self._judge()
            if not math.isfinite(loss):
                return loss
            if history.add(loss):
                history.best = floating(self._student)
        patience = steps.schedule.patience
        if patience is not None and history.stale >= patience:
            history.stopped = f"the held-out loss had not fallen for {patience} epochs"
        if self._accelerator.is_main_process:
            checkpoints.save(stage, *packed(self._student, steps.optimizer, steps.averages, history, at))
        return loss

    def _batches(self, inputs: Pool, generator: torch.Generator | None = None) -> list[Index]:
        return inputs.batches(self._batch_size, generator, takes=self._student.takes, fewest=self._fewest)

    def _drawn(self, inputs: Pool, draws: Draws, epoch: int, count: int) -> Iterator[Index]:
        """Yield `count` batches from the beginning of an epoch on."""
        for at in itertools.count(epoch):
            batches = self._batches(inputs, draws(f"batches {at}"))[:count]
            yield from batches
            count -= len(batches)
            if not count:
                return

    def _shares(self, batch: Batch, parts: int) -> list[tuple[Batch, float]]:
        """Return the parts of a batch that this process computes, each with its weight in the mean of processes."""
        processes, total = self._accelerator.num_processes, batch_count(batch)
        if processes * parts == 1:
            return [(batch, 1.0)]
        divided = torch.arange(total).tensor_split(min(processes * parts, max(total // self._fewest, 1)))
        own = divided[self._accelerator.process_index :: processes]
        shares = [(taken(batch, samples), processes * len(samples) / total) for samples in own]
        return shares or [(taken(batch, divided[0]), 0.0)]  # all processes take every step

    def _precise(self) -> contextlib.AbstractContextManager[Any]:
        """Compute in the precision asked for, or in Accelerate's own."""
        if self._precision == "float32":
            found: contextlib.AbstractContextManager[Any] = self._accelerator.autocast()
            return found
        return torch.autocast(self._device.type, torch.bfloat16)

    def _own(self, batch: Batch) -> Batch:
        return batch[: len(self._student.inputs)]

    def _on_device(self, batch: Batch) -> Batch:
        return tuple(part.to(self._device) for part in batch)


@dataclass
class _Steps:
    """What takes steps: a module and an optimizer as Accelerate prepared them."""

    schedule: Schedule
    parameters: list[nn.Parameter]
    module: nn.Module
    optimizer: Any
    averages: Averages | None
    losses: list[list[torch.Tensor]] = field(default_factory=list)  # of steps and their parts, not looked at yet


class _Module(nn.Module):
    """A program as the module Accelerate wraps: it may patch this forward, and the graph's modes still switch."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.graph_module = program.graph_module
        self._program = program

    def forward(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        return self._program.call_flat(batch)


def _accelerator(device: torch.device) -> tuple[Accelerator, torch.device]:
    """Return what runs the loop, and where: one process stays on the device given."""
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedDataParallelKwargs

    # Not told so, Accelerate (1.15) takes each of several processes on CPUs for the only one.
    several = PartialState(cpu=_on_cpu()).num_processes > 1
    found = Accelerator(
        device_placement=several, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)]
    )
    return found, found.device if several else device


def _on_cpu() -> bool:
    from accelerate.utils import parse_flag_from_env

    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
