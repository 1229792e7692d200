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


def portions(matrix: Tensor) -> Iterator[slice]:
    """Cut a matrix into runs of rows that fit in memory several times."""
    step = max(1, _ELEMENTS // max(1, matrix.shape[1]))
    yield from (slice(start, start + step) for start in range(0, len(matrix), step))


def to_integers(matrix: Tensor, scales: Scales, form: IntegerFormat) -> Tensor:
    """Round a matrix to the integers of its blocks, (rows, columns) of the format's type."""
    size = block_size(form, matrix.shape[1])
    result = torch.empty(matrix.shape, dtype=form.dtype)
    for rows in portions(matrix):
        steps = torch.round(in_blocks(matrix[rows], size) / scales.scale[rows].unsqueeze(2))
        steps = steps.add_(scales.zero[rows].unsqueeze(2)).clamp_(form.low, form.high)
        result[rows] = steps.flatten(1)[:, : matrix.shape[1]].to(form.dtype)
    return result


def to_reals(integers: Tensor, scales: Scales, form: IntegerFormat) -> Tensor:
    """Return the numbers that integers of a matrix stand for, (rows, columns) float32."""
    size = block_size(form, integers.shape[1])
    blocks = in_blocks(integers.float(), size) - scales.zero.unsqueeze(2)
    return (blocks * scales.scale.unsqueeze(2)).flatten(1)[:, : integers.shape[1]]


def noise(matrix: Tensor, integers: Tensor, scales: Scales, form: IntegerFormat) -> float:
    """Return the sum of the squared differences of a matrix and what its integers stand for."""
    total = 0.0
    for rows in portions(matrix):
        of_rows = Scales(scales.scale[rows], scales.zero[rows])
        total += float((to_reals(integers[rows], of_rows, form) - matrix[rows]).square_().sum(dtype=torch.float64))
    return total


def power(matrix: Tensor, mean: Tensor | float = 0.0) -> float:
    """Return the sum of the squares of a matrix less a row."""
    return sum(float((matrix[rows] - mean).square_().sum(dtype=torch.float64)) for rows in portions(matrix))


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
