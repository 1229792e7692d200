"""How a tensor may be stored as integers, as a value: bits, sign, symmetry, and what shares a scale.

IntegerFormat(8, granularity="channel", narrow=True)              -127..127 around 0, a scale per channel
IntegerFormat(8, signed=False, symmetric=False)                   0..255, any zero point
IntegerFormat(4, signed=False, granularity=Block(32))             0..15 around 8, a scale per 32 values
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, slots=True)
class Block:
    """One scale for each so many consecutive values along the axis that a layer sums over, the last block shorter."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"A block holds at least one value, not {self.size}.")


Granularity = Literal["tensor", "channel"] | Block

_STORAGE = ((torch.uint8, 0, 255), (torch.int8, -128, 127), (torch.int32, -(2**31), 2**31 - 1))


def storage_dtype(low: int, high: int) -> torch.dtype:
    """Return the smallest integer dtype that holds `low` to `high`: unsigned when nothing is negative."""
    for dtype, smallest, largest in _STORAGE:
        if smallest <= low <= high <= largest:
            return dtype
    raise ValueError(f"No integer storage holds the range {low} to {high}; int32 is the widest.")


@dataclass(frozen=True, slots=True)
class IntegerFormat:
    """How a tensor may be stored as integers.

    Attributes:
        bits: of one integer, 1 to 31.
        signed: whether the range starts below 0.
        symmetric: whether the zero point is given: 0 of signed integers, the middle of unsigned ones.
        granularity: what shares a scale: the tensor, an output channel, or a `Block` of consecutive inputs of one.
        narrow: whether the smallest integer is left out, so that the range is as wide below the zero point as above.
    """

    bits: int
    signed: bool = True
    symmetric: bool = True
    granularity: Granularity = "tensor"
    narrow: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 31:
            raise ValueError(f"Integers have 1 to 31 bits, not {self.bits}.")

    @property
    def low(self) -> int:
        """Smallest integer."""
        return (-(1 << self.bits - 1) if self.signed else 0) + self.narrow

    @property
    def high(self) -> int:
        """Largest integer."""
        return (1 << self.bits - self.signed) - 1

    @property
    def zero_point(self) -> int:
        """The zero point of a symmetric format."""
        return 0 if self.signed else 1 << self.bits - 1

    @property
    def dtype(self) -> torch.dtype:
        """Which integers hold the range where each takes a place of its own."""
        return storage_dtype(self.low, self.high)
