"""What a student is taught: the values it is to give for a batch, and the losses of those it gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from graphopt.data.batches import Batch
from graphopt.distillation.objective import Objective
from graphopt.ir.placing import place
from graphopt.ir.program import Program


class Lesson(Protocol):
    """Says what a student learns from a batch: its own inputs first, then whatever else the lesson reads."""

    def place(self, device: torch.device) -> None:
        """Move what the lesson holds to the device of the student and its batches."""

    def wanted(self, batch: Batch) -> Any:
        """Return what the student is to give for a batch; called without gradients, and kept for held-out batches."""

    def loss(self, outputs: Sequence[torch.Tensor], wanted: Any, batch: Batch) -> torch.Tensor:
        """Return what is trained on: the loss of the student's flat outputs, a mean over samples."""

    def judged(self, outputs: Sequence[torch.Tensor], wanted: Any, batch: Batch) -> torch.Tensor:
        """Return what a student is judged by on held-out samples: a mean over samples, lower is better."""


class Imitation:
    """The student is to give what a teacher gives.

    Args:
        teacher: takes what the student takes; tapped as the objective says, owning its tensors, since they move.
        objective: reads the flat outputs of both.
    """

    def __init__(self, teacher: Program, objective: Objective) -> None:
        self._teacher, self._objective = teacher, objective

    def place(self, device: torch.device) -> None:
        """Move the teacher."""
        place(self._teacher.graph_module, device)

    def wanted(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """Return the teacher's outputs."""
        return self._teacher.call_flat(batch[: len(self._teacher.inputs)])

    def loss(self, outputs: Sequence[torch.Tensor], wanted: Any, batch: Batch) -> torch.Tensor:
        """Return the loss of outputs and taps."""
        return self._objective(outputs, wanted)

    def judged(self, outputs: Sequence[torch.Tensor], wanted: Any, batch: Batch) -> torch.Tensor:
        """Return the loss of the outputs alone."""
        return self._objective.of_outputs(outputs, wanted)
