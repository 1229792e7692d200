"""A matrix cut into blocks of its rows, and as integers with a scale and a zero point for each.

w (rows, columns)    ->    (rows, blocks, size), filled up with zeros        w' = (q - zero) * scale
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.quantization.formats import Block, IntegerFormat

TINY = 1e-30  # blocks of smaller weights are stored as zeros, so that scales stay normal float32 numbers
_ELEMENTS = 1 << 22  # worked on at once


@dataclass(frozen=True, eq=False)
class Scales:
    """What integers of a matrix stand for.

    Attributes:
        scale: (rows, blocks) float32, positive.
        zero: (rows, blocks) whole numbers, float32.
    """

    scale: Tensor
    zero: Tensor


def block_size(form: IntegerFormat, columns: int) -> int:
    """Return the columns of a block: a whole row's for formats without blocks."""
    return min(form.granularity.size, columns) if isinstance(form.granularity, Block) else columns


def in_blocks(matrix: Tensor, size: int) -> Tensor:
    """Return (rows, blocks, size) of a matrix (rows, columns)."""
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % size)).reshape(len(matrix), -1, size)


def portions(rows: Tensor) -> Iterator[Tensor]:
    """Cut a matrix into runs of rows that fit in memory several times."""
    yield from torch.split(rows, max(1, _ELEMENTS // max(1, rows.shape[1])))


def to_integers(matrix: Tensor, scales: Scales, form: IntegerFormat) -> Tensor:
    """Round a matrix to the integers of its blocks, (rows, columns) of the format's type."""
    size = block_size(form, matrix.shape[1])
    steps = torch.round(in_blocks(matrix, size) / scales.scale.unsqueeze(2)) + scales.zero.unsqueeze(2)
    return steps.clamp_(form.low, form.high).flatten(1)[:, : matrix.shape[1]].to(form.dtype)


def to_reals(integers: Tensor, scales: Scales, form: IntegerFormat) -> Tensor:
    """Return the numbers that integers of a matrix stand for, (rows, columns) float32."""
    size = block_size(form, integers.shape[1])
    blocks = in_blocks(integers.float(), size) - scales.zero.unsqueeze(2)
    return (blocks * scales.scale.unsqueeze(2)).flatten(1)[:, : integers.shape[1]]


def covering(low: Tensor, high: Tensor, form: IntegerFormat) -> Scales:
    """Return the finest scales whose range holds [low, high], which holds 0; any shape."""
    if form.symmetric:
        zero = torch.full_like(high, form.zero_point)
        below = -low / max(form.zero_point - form.low, 1)
        return Scales(_positive(torch.maximum(below, high / (form.high - form.zero_point))), zero)
    scale = _positive((high - low) / (form.high - form.low))
    return Scales(scale, (form.low - torch.round(low / scale)).clamp(form.low, form.high))


def bounds(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest number of each block, 0 between them."""
    low, high = torch.aminmax(blocks, dim=-1)
    return low.clamp(max=0.0), high.clamp(min=0.0)


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale < TINY, torch.ones_like(scale), scale)
