"""The signature of a program: its tensor inputs and outputs, and what a user should know about it."""

from __future__ import annotations

from collections.abc import Sequence
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


def batch_size(inputs: Sequence[TensorSpec]) -> int | None:
    """Return how many samples one call takes, None where any number fits.

    Samples lie along the first axis of every input, so that one input of a fixed size there fixes the number for all.
    A call without any such axis is one sample.
    """
    sizes = [spec.shape[0] for spec in inputs if spec.shape]
    return next((size for size in sizes if isinstance(size, int)), None if sizes else 1)
