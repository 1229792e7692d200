"""The training loop, under Accelerate: where the program is or, started by `accelerate launch`, in many processes.

The one adapter to `accelerate`, which is imported when a loop starts and not before. Every process draws the same
batches and computes its share of each, so a run takes the same steps however many there are.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graphopt.data.batches import Batch, batch_count
from graphopt.distillation.augment import View
from graphopt.distillation.lesson import Lesson
from graphopt.distillation.pool import Index, Pool
from graphopt.distillation.statistics import estimate_statistics
from graphopt.distillation.weights import keep_zeros, overwrite, snapshot
from graphopt.errors import PassError
from graphopt.ir.placing import place
from graphopt.ir.program import Program
from graphopt.pipeline.context import Progress

if TYPE_CHECKING:
    from accelerate import Accelerator

# Floor of a tensor's root mean square, for biases that start at 0 (Adafactor: Shazeer and Stern 2018, section 8).
_SMALLEST_RMS = 1e-3


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long to train."""

    epochs: int
    warmup: float  # fraction of all steps in which the rate rises from 0; it falls to 0 as a cosine after
    patience: int  # epochs without a lower held-out loss before stopping


class DivergedError(PassError):
    """Training reached a loss that is not finite."""


@dataclass
class History:
    """The held-out loss before training and after each epoch, and the tensors where it was lowest."""

    losses: list[float]
    best: dict[str, torch.Tensor] = field(default_factory=dict)  # empty: no epoch was better than what came in
    stale: int = 0  # epochs since the lowest


class Trainer:
    """Trains a student program by a lesson, and judges it on samples it never trains on.

    Args:
        student: with the outputs that the lesson reads, owning its tensors; trained in place, where it is, or where
            Accelerate puts each process.
        lesson: what is learned.
        held_out: what the student is judged on.
        batch_size: over all processes.
    """

    def __init__(self, student: Program, lesson: Lesson, held_out: Pool, batch_size: int) -> None:
        self._accelerator, self._device = _accelerator(student.device)
        self._student, self._lesson = student, lesson
        self._held_out, self._batch_size = held_out, batch_size
        self._names = [name for name, tensor in student.state_dict().items() if tensor.is_floating_point()]
        place(student.graph_module, self._device)
        lesson.place(self._device)
        keep_zeros(student)
        self._expected: list[Any] = []

    def held_out_loss(self) -> float:
        """Return what the student is judged by on the held-out samples, in evaluation mode."""
        self._student.eval()
        chunks = [self._on_device(self._held_out.take(index)) for index in self._batches(self._held_out)]
        with torch.no_grad():
            self._expected = self._expected or [self._lesson.wanted(chunk) for chunk in chunks]
            losses = [
                self._lesson.judged(self._student.call_flat(self._own(chunk)), wanted, chunk) * batch_count(chunk)
                for chunk, wanted in zip(chunks, self._expected, strict=True)
            ]
        mean = torch.stack(losses).sum() / sum(batch_count(chunk) for chunk in chunks)
        # Statistics of BatchNorm differ between processes while training: all must decide alike.
        return float(self._accelerator.reduce(mean, "mean"))

    def estimate(self, inputs: Pool) -> dict[str, torch.Tensor]:
        """Re-estimate the student's BatchNorm statistics on `inputs`, put them in place and return them."""
        self._student.eval()
        batches = (self._own(self._on_device(inputs.take(index))) for index in self._batches(inputs))
        found = estimate_statistics(self._student, batches)
        overwrite(self._student, found)
        return snapshot(self._student, list(found))

    def fit(
        self,
        inputs: Pool,
        schedule: Schedule,
        rate: float,
        view: View,
        generator: torch.Generator,
        progress: Progress,
    ) -> History:
        """Train on `inputs`; keep the tensors of the epoch with the lowest held-out loss.

        Args:
            inputs: what to train on.
            schedule: how long.
            rate: largest AdamW step, as a fraction of the root mean square of each tensor.
            view: makes a new view of each batch.
            generator: draws batches and views.
            progress: shows the steps.

        Raises:
            DivergedError: the loss is not finite.
        """
        per_epoch = len(self._batches(inputs))
        total = schedule.epochs * per_epoch
        history = History([self.held_out_loss()])
        steps = progress.track(self._drawn(inputs, schedule.epochs, generator), "recover: training", total)
        with self._prepared(rate, total, schedule.warmup) as step:
            for done, index in enumerate(steps, start=1):
                step(view(self._share(inputs, index), generator))
                if done % per_epoch == 0:
                    self._keep(history)
                    if history.stale >= schedule.patience:
                        break
                    self._student.train()
        return history

    @contextlib.contextmanager
    def _prepared(self, rate: float, total: int, warmup: float) -> Iterator[Callable[[Batch], None]]:
        """Yield a function that takes one step on one batch."""
        optimizer = torch.optim.AdamW(_groups(self._student, rate), weight_decay=0.0)
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: _rate(at, total, warmup))
        module, prepared = self._accelerator.prepare(_Module(self._student), optimizer)

        def step(batch: Batch) -> None:
            self._step(module, prepared, batch)
            rates.step()

        try:
            yield step
        finally:
            self._student.eval()
            self._accelerator.free_memory()  # hooks of a wrapped module would fire again in the next training

    def _step(self, module: nn.Module, optimizer: Any, batch: Batch) -> None:
        with torch.no_grad(), self._accelerator.autocast():
            wanted = self._lesson.wanted(batch)
        loss = self._lesson.loss(module(self._own(batch)), wanted, batch)
        seen = float(self._accelerator.reduce(loss.detach(), "mean"))  # all processes stop, or none
        if not math.isfinite(seen):
            raise DivergedError(
                f"Recovery training diverged: the loss is {seen}. Try a tenth of the rate, recover:lr=..., and "
                "look for samples that are not finite."
            )
        optimizer.zero_grad()
        self._accelerator.backward(loss)
        optimizer.step()

    def _keep(self, history: History) -> None:
        """Note the held-out loss of an epoch; copy the tensors if it is the lowest so far."""
        loss = self.held_out_loss()
        better = loss < min(history.losses)
        history.losses.append(loss)
        history.stale = 0 if better else history.stale + 1
        if better:
            history.best = snapshot(self._student, self._names)

    def _batches(self, inputs: Pool, generator: torch.Generator | None = None) -> list[Index]:
        return inputs.batches(self._batch_size, generator, takes=self._student.takes)

    def _drawn(self, inputs: Pool, epochs: int, generator: torch.Generator) -> Iterator[Index]:
        self._student.train()
        for _ in range(epochs):
            yield from self._batches(inputs, generator)

    def _share(self, inputs: Pool, index: Index) -> Batch:
        """Return this process's share of a batch."""
        bucket, samples = index
        share = samples.tensor_split(self._accelerator.num_processes)[self._accelerator.process_index]
        return self._on_device(inputs.take((bucket, share)))

    def _own(self, batch: Batch) -> Batch:
        return batch[: len(self._student.inputs)]

    def _on_device(self, batch: Batch) -> Batch:
        return tuple(part.to(self._device) for part in batch)


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

    several = PartialState().num_processes > 1
    found = Accelerator(
        device_placement=several, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)]
    )
    return found, found.device if several else device


def _groups(student: Program, rate: float) -> list[dict[str, Any]]:
    """Give every tensor steps in proportion to its size, so that one rate suits convolutions and transformers."""
    return [
        {"params": [parameter], "lr": rate * max(float(parameter.detach().square().mean().sqrt()), _SMALLEST_RMS)}
        for parameter in student.parameters()
        if parameter.requires_grad and parameter.numel()
    ]


def _rate(at: int, total: int, warmup: float) -> float:
    rising = max(1, round(warmup * total))
    if at < rising:
        return (at + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (at - rising) / max(1, total - rising)))
