"""From a range to scale and zero point.

    q = clamp(round(x / scale) + zero_point, low, high)

0 is always represented exactly: padding, masking and ReLU depend on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graphopt.quantization.formats import IntegerFormat
from graphopt.quantization.ops import quantize

Reals = npt.NDArray[np.float64]

_OF_NOTHING = 2.0**-20  # scale of weights that are all 0
TINY = 1e-30  # ranges below it are treated as empty, so that scales stay normal float32 numbers


@dataclass(frozen=True, slots=True)
class QParams:
    """One scale and zero point, and the integers allowed. `scale` is exactly representable in float32."""

    scale: float
    zero_point: int
    low: int
    high: int

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and largest real number that can be stored."""
        return self.scale * (self.low - self.zero_point), self.scale * (self.high - self.zero_point)


def from_range(low: float, high: float, integers: IntegerFormat, *, limit: float = math.inf) -> QParams:
    """Return the finest scale that covers `low` to `high` and 0.

    Args:
        low: smallest real number to store.
        high: largest real number to store.
        integers: the format to store in.
        limit: upper bound that the largest storable number must not exceed, whatever `scale` rounds to.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if high - low < TINY:  # nothing but zeros was seen
        high = min(1.0, limit)
    scales, zero_points = scales_of(np.array([low]), np.array([high]), integers)
    scale, zero_point = np.float32(scales[0]), int(zero_points[0])
    while float(scale) * (integers.high - zero_point) > limit:
        scale = np.nextafter(scale, np.float32(0))
    return QParams(float(scale), zero_point, integers.low, integers.high)


def weight_scales(weight: Tensor, integers: IntegerFormat, axis: int | None) -> Tensor:
    """Choose the scales of a weight, symmetric around 0: the largest magnitude is kept.

    Shrinking the range to the least squared error was tried: 0.005 dB better on ResNet-20 and ResNet-56, within noise.

    Args:
        weight: any shape.
        integers: the format to store in.
        axis: the axis that scales differ along; None for one scale.

    Returns:
        (weight.shape[axis],) or () float32, all positive.
    """
    rows = weight.double().reshape(1, -1) if axis is None else weight.double().movedim(axis, 0).flatten(1)
    largest = rows.abs().amax(dim=1)
    steps = min(integers.high, -integers.low)
    # What has no weights may have a bias, which runtimes round by the scale: it is none that is too coarse for others.
    scales = largest[largest >= TINY] / steps
    scales = torch.where(largest < TINY, scales.amin() if len(scales) else _OF_NOTHING, largest / steps).float()
    return scales.reshape(()) if axis is None else scales


def quantize_weight(weight: Tensor, scales: Tensor, integers: IntegerFormat, axis: int | None) -> Tensor:
    """Round `weight` to the integers of `scales`, zero point 0, staying symmetric around 0."""
    steps = min(integers.high, -integers.low)
    zero = torch.zeros_like(scales, dtype=integers.dtype)
    integer: Tensor = quantize(weight.detach().float(), scales, zero, axis, -steps, steps)
    return integer


def scales_of(low: Reals, high: Reals, integers: IntegerFormat) -> tuple[Reals, Reals]:
    """Return scales and zero points of several ranges that all contain 0."""
    if integers.symmetric:
        zero_point = integers.zero_point
        scale = np.maximum(-low / (zero_point - integers.low), high / (integers.high - zero_point))
        return scale, np.full_like(scale, zero_point)
    scale = (high - low) / (integers.high - integers.low)
    return scale, np.clip(np.rint(integers.low - low / scale), integers.low, integers.high)
