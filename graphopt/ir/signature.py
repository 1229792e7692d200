"""The signature of a program: its tensor inputs and outputs, and what a user should know about it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Dimension = int | str  # a size, or the name of a dynamic axis


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, shape and dtype of one flat input or output; dynamic axes are named, not sized."""

    name: str
    shape: tuple[Dimension, ...]
    dtype: torch.dtype

    @property
    def batched(self) -> bool:
        """Whether the first axis is dynamic, so that any number of samples fits."""
        return bool(self.shape) and isinstance(self.shape[0], str)

    def __str__(self) -> str:
        return f"{self.name}: {'x'.join(map(str, self.shape)) or 'scalar'} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True, slots=True)
class Note:
    """One thing about a program that a user should know: what eval capture lost, why it is static."""

    subject: str
    text: str
