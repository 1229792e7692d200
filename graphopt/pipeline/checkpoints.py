"""Where a long computation of a pass has come to, kept so that a killed run goes on there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from graphopt.ir.plain_data import Json

State = tuple[Mapping[str, Json], Mapping[str, torch.Tensor]]


class Checkpoints(Protocol):
    """Keeps the last state of each stage of one step of a run, by the stage's name."""

    def load(self, stage: str) -> State | None:
        """Return the state of a stage, if this run, or one on the same things that was killed, has come to it."""

    def save(self, stage: str, content: Mapping[str, Json], tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep the state of a stage in place of the one before."""


class NoCheckpoints:
    """Keeps nothing."""

    def load(self, stage: str) -> State | None:
        """Return None."""
        return None

    def save(self, stage: str, content: Mapping[str, Json], tensors: Mapping[str, torch.Tensor]) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class PartCheckpoints:
    """Those of one part of a step, whose stages are called as those of others.

    Attributes:
        checkpoints: of the whole step.
        part: its name.
    """

    checkpoints: Checkpoints
    part: str

    def load(self, stage: str) -> State | None:
        """Return the state of a stage of this part."""
        return self.checkpoints.load(f"{self.part}: {stage}")

    def save(self, stage: str, content: Mapping[str, Json], tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep the state of a stage of this part."""
        self.checkpoints.save(f"{self.part}: {stage}", content, tensors)
