"""The signature of a program: its tensor inputs and outputs, and what a user should know about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphopt.ir.sizes import ANY, SizeRange

Dimension = int | str  # a size, or the name of a dynamic axis


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, shape and dtype of one flat input or output; dynamic axes are named, not sized.

    Attributes:
        name: of an input as the model's argument, of an output as its place in what is returned.
        shape: sizes, and names of dynamic ones: equal names are equal sizes.
        dtype: of its elements.
        ranges: by axis which sizes an input may have, nothing where it may have any.
    """

    name: str
    shape: tuple[Dimension, ...]
    dtype: torch.dtype
    ranges: tuple[SizeRange, ...] = ()

    def __post_init__(self) -> None:
        """Let specs that say the same be equal."""
        if all(sizes == ANY for sizes in self.ranges):
            object.__setattr__(self, "ranges", ())

    def range_of(self, axis: int) -> SizeRange:
        """Return which sizes an axis may have, as far as it is dynamic."""
        return self.ranges[axis] if self.ranges else ANY

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


def range_notes(inputs: Sequence[TensorSpec]) -> list[Note]:
    """Say which sizes dynamic axes are bound to, of axes that are of one size once."""
    bound: dict[Dimension, Note] = {}
    for spec in inputs:
        for axis, size in enumerate(spec.shape):
            if isinstance(size, str) and (sizes := spec.range_of(axis)) != ANY:
                text = f"Axis {axis} of `{spec.name}` has a size of {sizes}: the program is of no other."
                bound.setdefault(size, Note("sizes", text))
    return [*bound.values()]


def size_out_of_range(name: str, ranges: Sequence[SizeRange], shape: Sequence[int]) -> str:
    """Say which axis of an input has a size that it may not have, "" if none has."""
    for axis, (sizes, size) in enumerate(zip(ranges, shape, strict=False)):
        if size not in sizes:
            return f"Axis {axis} of input `{name}` has a size of {size}, and the program is of {sizes}."
    return ""


def batch_size(inputs: Sequence[TensorSpec]) -> int | None:
    """Return how many samples one call takes, None where any number fits.

    Samples lie along the first axis of every input, so that one input of a fixed size there fixes the number for all.
    A call without any such axis is one sample.
    """
    sizes = [spec.shape[0] for spec in inputs if spec.shape]
    return next((size for size in sizes if isinstance(size, int)), None if sizes else 1)
