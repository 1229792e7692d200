"""Numbers below a bound, several to a byte, so that a look-up in a small table unpacks them.

256 numbers a byte's worth      1 in a byte, as it is
16, 4, 2                        2, 4, 8 in a byte, the first in the lowest bits
3                               5 in a byte, as digits to the base 3
8, 32, 64, 128                  in several parts: 3 bits are 2 and 1, 7 are 4, 2 and 1
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

BYTE = 256  # how many numbers one holds
_PARTS = {1: (2,), 2: (4,), 3: (4, 2), 4: (16,), 5: (16, 2), 6: (16, 4), 7: (16, 4, 2), 8: (256,)}


def bases(count: int) -> tuple[int, ...]:
    """Return the bases of the parts in which numbers below `count`, 3 or a power of 2 to 256, are stored."""
    return (3,) if count == 3 else _PARTS[count.bit_length() - 1]


def per_byte(base: int) -> int:
    """Return how many digits to a base go into a byte."""
    return next(number for number in range(8, 0, -1) if base**number <= BYTE)


def digits(base: int) -> Tensor:
    """Return the digits that each byte stands for, (256, digits of a byte) uint8, the lowest first."""
    places = base ** torch.arange(per_byte(base))
    return (torch.arange(BYTE).unsqueeze(1) // places % base).to(torch.uint8)


def digits_of(parts: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Return a name for the digits of each part, its base, and the place of its digits."""
    places = [math.prod(parts[:index]) for index in range(len(parts))]
    return {f"digits{base}x{place}": (base, place) for base, place in zip(parts, places, strict=True)}


def pack(codes: Tensor, parts: Sequence[int]) -> list[Tensor]:
    """Put the numbers of each row into bytes.

    Args:
        codes: (rows, count), not negative, below the product of `parts`.
        parts: bases, of the lowest digits first.

    Returns:
        For each part (rows, bytes) uint8.
    """
    codes, packed = codes.to(torch.uint8), []
    if BYTE in parts:
        return [codes]
    for base in parts:
        size = per_byte(base)
        grouped = torch.unflatten(pad(codes % base, (0, -codes.shape[1] % size)), 1, (-1, size))
        packed.append((grouped * (base ** torch.arange(size)).to(torch.uint8)).sum(2, dtype=torch.uint8))
        codes = codes // base
    return packed


def packed_bytes(rows: int, count: int, parts: Sequence[int]) -> int:
    """Return the bytes that `pack` makes of (rows, count)."""
    return rows * sum(math.ceil(count / per_byte(base)) for base in parts)
