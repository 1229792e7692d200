"""A rate chosen by a few steps at each of several, all from the same weights on the same batches.

What is best in a few steps is too small for many: a high rate first spoils what it later more than makes up for (Wu et
al. 2018, "Understanding Short-Horizon Bias in Stochastic Meta-Optimization"). Measured on recurrent, transformer,
convolutional and fully connected networks, the best rate grew as the number of steps did: of twelve steps it was 0.001
to 0.003, of 144 it was 0.01 to 0.03. So what a trial finds is scaled to the length of the training.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch

from graphopt.distillation.history import History
from graphopt.distillation.loop import Schedule
from graphopt.distillation.statistics import batch_norms
from graphopt.distillation.weights import floating, overwrite
from graphopt.ir.plain_data import Json
from graphopt.ir.program import Program

_SHARE = 1 / 24  # of the steps, that each rate is tried for
_FEWEST = 12  # steps


class RateTrials:
    """Tries rates on a student, which has its tensors back after each.

    Args:
        fit: trains the student by a schedule, called what it says.
        student: the student.
        schedule: of the training that a rate is chosen for.
        per_epoch: steps of one epoch of it.

    Attributes:
        start: the tensors of the student.
        best: those that the best trial ended with, if it won anything.
        lowest: its held-out loss.
        tried: what each trial was, and the held-out loss after it.
    """

    def __init__(
        self, fit: Callable[[Schedule, str], History], student: Program, schedule: Schedule, per_epoch: int
    ) -> None:
        self._fit, self._student, self._schedule = fit, student, schedule
        self._total = schedule.total(per_epoch)
        self._steps = min(self._total, max(_FEWEST, round(_SHARE * self._total)))
        self.start = floating(student)
        self.best: dict[str, torch.Tensor] = {}
        self.lowest = math.inf
        self.tried: list[dict[str, Json]] = []

    def choose(self, rates: Sequence[float], growth: float = 1.0) -> Schedule:
        """Return the schedule at the best of `rates`, from high to low, scaled to its length, the highest at most.

        Args:
            rates: those that are tried.
            growth: the power of the length over that of a trial that the rate is scaled by.
        """
        found: dict[int, float] = {}

        def loss(at: int) -> float:
            if at not in found:
                found[at] = self._try(rates[at], frozen=False)
            return found[at]

        at = len(rates) // 2
        up = at > 0 and loss(at) > loss(at - 1)
        while 0 <= (further := at - 1 if up else at + 1) < len(rates) and loss(further) < loss(at):
            at = further
        frozen = bool(batch_norms(self._student)) and self._try(rates[at], frozen=True) < loss(at)
        rate = min(rates[at] * (self._total / self._steps) ** growth, rates[0])
        return dataclasses.replace(self._schedule, rate=rate, frozen=frozen)

    def _try(self, rate: float, *, frozen: bool) -> float:
        """Return the held-out loss after a trial."""
        schedule = dataclasses.replace(self._schedule, rate=rate, frozen=frozen, steps=self._steps)
        history = self._fit(schedule, f"trying rate {rate:g}{', BatchNorm frozen' if frozen else ''}")
        loss = history.losses[-1]
        overwrite(self._student, self.start)
        if history.best and min(history.losses) < self.lowest:
            self.best, self.lowest = history.best, min(history.losses)
        self.tried.append({"rate": rate, "frozen": frozen, "steps": self._steps, "loss": loss})
        return loss
