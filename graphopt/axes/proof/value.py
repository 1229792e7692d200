"""A tensor of the original program together with the positions of each dimension that have been removed.

Removed positions form whole slices: what is left of a tensor is a box, one index list per dimension. So they are
kept as one boolean vector per dimension (True: removed), or None where nothing is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from graphopt.errors import VerifyError

Vector: TypeAlias = Tensor | None
Dead: TypeAlias = tuple[Vector, ...]


class CannotProveError(VerifyError):
    """An operator, or a use of one, for which it is not known what masking means."""


@dataclass(eq=False)
class Value:
    """A tensor and, for each of its dimensions, which positions are removed.

    Along a dimension in `counted` all elements are equal, as in zeros made anew, and only the number of removed
    positions is known. The flags there are one choice of them; they count where positions do not matter (a sum, a
    softmax) and give way to what another operand knows.
    """

    tensor: Tensor
    dead: Dead
    counted: Mapping[int, Tensor] = field(default_factory=dict)
    owner: Value = field(init=False)  # the value whose memory a view shows; itself if it is no view

    def __post_init__(self) -> None:
        if len(self.dead) != self.tensor.dim():
            raise ValueError(f"a tensor of {self.tensor.dim()} dimensions was given flags for {len(self.dead)}")
        self.owner = self

    @property
    def masked(self) -> bool:
        """Whether any position is removed."""
        return any(vector is not None for vector in self.dead)


def whole(tensor: Tensor) -> Value:
    """Return a value of which nothing is removed."""
    return Value(tensor, (None,) * tensor.dim())


def vector(flags: Tensor) -> Vector:
    """Return boolean flags as a vector, None if none is set."""
    return flags if bool(flags.any()) else None


def same_flags(a: Vector, b: Vector) -> bool:
    """Tell whether two vectors flag the same positions."""
    return a is b if a is None or b is None else a.equal(b)


def union(*vectors: Vector) -> Vector:
    """Return the positions removed in any of the vectors; a vector of length 1 is broadcast."""
    result: Vector = None
    for flags in vectors:
        if flags is not None:
            result = flags if result is None else result | flags
    return result


def broadcast(operands: Iterable[Dead]) -> Dead:
    """Align dimensions at the last one, as elementwise operators do, and join what is removed."""
    rows = list(operands)
    rank = max((len(dead) for dead in rows), default=0)
    padded = [(None,) * (rank - len(dead)) + tuple(dead) for dead in rows]
    return tuple(union(*column) for column in zip(*padded, strict=True))


def known_or_counted(value: Value) -> Dead:
    """Return which positions are removed, one choice of them where only their number is known."""
    return tuple(flags if flags is not None else value.counted.get(d) for d, flags in enumerate(value.dead))


def joined(values: Sequence[Value]) -> tuple[Dead, dict[int, Tensor]]:
    """Join operands aligned at the last dimension: what is removed, and the dimensions where that is only counted.

    A dimension stays counted only if every operand's elements are equal along it: beside others, positions matter.
    """
    dead = broadcast(value.dead for value in values)
    counted: dict[int, Tensor] = {}
    for value in values:
        for d, flags in value.counted.items():
            place = d + len(dead) - len(value.dead)
            if dead[place] is None and all(_equal_along(other.tensor, place - len(dead)) for other in values):
                counted.setdefault(place, flags)
    return dead, counted


def _equal_along(tensor: Tensor, dim: int) -> bool:
    """Tell whether all elements along a dimension, counted from the last one, are equal; one it does not have is."""
    return tensor.dim() < -dim or tensor.size(dim) < 2 or bool((tensor == tensor.narrow(dim, 0, 1)).all())


def survivors(flags: Tensor) -> Tensor:
    """Return the indices that are not removed."""
    return torch.nonzero(~flags).flatten()


def compact(tensor: Tensor, dead: Sequence[Vector]) -> Tensor:
    """Return what is left of a tensor: the surviving positions in order."""
    for dim, flags in enumerate(dead):
        if flags is not None:
            tensor = tensor.index_select(dim, survivors(flags))
    return tensor


def spread(tensor: Tensor, dead: Sequence[Vector]) -> Tensor:
    """Undo `compact`: put surviving positions back at their places, zero elsewhere."""
    for dim, flags in enumerate(dead):
        if flags is not None:
            shape = [*tensor.shape[:dim], flags.numel(), *tensor.shape[dim + 1 :]]
            tensor = tensor.new_zeros(shape).index_copy_(dim, survivors(flags), tensor)
    return tensor


def zeroed(tensor: Tensor, dead: Sequence[Vector]) -> Tensor:
    """Return a tensor with zeros at the removed positions, whatever was there (NaN included)."""
    for dim, flags in enumerate(dead):
        if flags is not None and tensor.size(dim) == flags.numel():
            tensor = tensor.index_fill(dim, torch.nonzero(flags).flatten(), 0)
    return tensor


def to_mask(shape: Sequence[int], dead: Sequence[Vector]) -> Tensor:
    """Return the removed elements of a tensor as one boolean tensor of its shape."""
    mask = torch.zeros(tuple(shape), dtype=torch.bool)
    for dim, flags in enumerate(dead):
        if flags is not None:
            mask |= flags.view([-1 if d == dim else 1 for d in range(len(shape))])
    return mask


def from_mask(mask: Tensor) -> Dead:
    """Return removed elements as vectors.

    Raises:
        CannotProveError: what survives is no box, so no smaller tensor holds it; or nothing survives.
    """
    if not bool(mask.any()):
        return (None,) * mask.dim()
    alive = int(torch.argmin(mask.flatten().to(torch.uint8)))
    dead = []
    for dim in range(mask.dim()):
        line, inner = mask, alive
        for other, stride in enumerate(_strides(mask.shape)):
            index, inner = divmod(inner, stride)
            line = line if other == dim else line.narrow(other, index, 1)
        dead.append(vector(line.flatten()))
    if not torch.equal(to_mask(mask.shape, dead), mask):
        raise CannotProveError("the elements that survive do not form a box, so no smaller tensor can hold them")
    return tuple(dead)


def _strides(shape: Sequence[int]) -> list[int]:
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return strides[::-1]
