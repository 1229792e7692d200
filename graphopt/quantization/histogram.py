"""Statistics of what passes through a node, gathered batch by batch in bounded memory.

The histogram's bins are [i * 2**k, (i + 1) * 2**k): aligned to zero, with a power of two as width. Widening merges
neighbours exactly, so the result is a function of the values seen and not of how they were cut into batches.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

BINS = 4096  # at least 8 bins for each of 256 integer levels
_MOVING = 0.01  # weight of the latest of many updates in a moving average
_SMALLEST_EXPONENT = -120  # keeps 2**-k finite in float32


class NotFiniteError(ValueError):
    """A value that holds NaN or infinities was given to a statistic."""


class Statistic(Protocol):
    """Something gathered about one node's values."""

    @property
    def key(self) -> str:
        """What is gathered, for caching: equal keys are interchangeable."""

    def update(self, x: Tensor) -> None:
        """Take in one batch of values.

        Raises:
            NotFiniteError: `x` holds NaN or infinities.
        """


class Histogram:
    """Counts of values in at most `BINS` bins that always cover 0.

    Attributes:
        low: smallest value seen, at most 0.
        high: largest value seen, at least 0.
        exponent: bins are 2**exponent wide.
        first: index of the first bin: it starts at first * 2**exponent.
        counts: (bins,) int64.
    """

    key = "histogram"

    def __init__(self) -> None:
        self.low = 0.0
        self.high = 0.0
        self.exponent = _SMALLEST_EXPONENT
        self.first = 0
        self.counts = torch.zeros(1, dtype=torch.int64)

    def update(self, x: Tensor) -> None:
        """Count the values of `x`."""
        if x.numel() == 0:
            return
        values = x.detach().reshape(-1).float()
        low, high = (float(bound) for bound in torch.aminmax(values))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise NotFiniteError
        self._cover(low, high)
        bins = values.mul(2.0**-self.exponent).floor_().sub_(self.first).to(torch.int32)
        self.counts += torch.bincount(bins, minlength=len(self.counts)).cpu()

    def merged(self, other: Histogram) -> Histogram:
        """Return the histogram of the values of both."""
        result = Histogram()
        for part in (self, other):
            result._cover(part.low, part.high)
        for part in (self, other):
            offset, counts = result._placed(part.first, part.counts, part.exponent)
            result.counts[offset : offset + len(counts)] += counts
        return result

    @property
    def centres(self) -> Tensor:
        """Centres of the bins, (bins,) float64. The ends are drawn in to the values really seen."""
        edges = (torch.arange(len(self.counts) + 1, dtype=torch.float64) + self.first) * 2.0**self.exponent
        edges = edges.clamp(self.low, self.high)
        return (edges[:-1] + edges[1:]) / 2

    def _cover(self, low: float, high: float) -> None:
        """Widen and extend the bins until they cover `low` to `high` as well."""
        self.low, self.high = min(self.low, low), max(self.high, high)
        exponent = max(self.exponent, self._exponent_for_range())
        first = math.floor(self.low * 2.0**-exponent)
        size = math.floor(self.high * 2.0**-exponent) - first + 1
        if (exponent, first, size) == (self.exponent, self.first, len(self.counts)):
            return
        old = (self.first, self.counts, self.exponent)
        self.exponent, self.first, self.counts = exponent, first, torch.zeros(size, dtype=torch.int64)
        offset, counts = self._placed(*old)
        self.counts[offset : offset + len(counts)] = counts

    def _exponent_for_range(self) -> int:
        span = self.high - self.low
        exponent = max(_SMALLEST_EXPONENT, math.frexp(span / BINS)[1] - 2) if span else _SMALLEST_EXPONENT
        while math.floor(self.high * 2.0**-exponent) - math.floor(self.low * 2.0**-exponent) >= BINS:
            exponent += 1
        return exponent

    def _placed(self, first: int, counts: Tensor, exponent: int) -> tuple[int, Tensor]:
        """Express narrower or equal bins in this histogram's bins: (offset of the first, counts)."""
        merge = self.exponent - exponent
        if merge == 0:
            return first - self.first, counts
        index = (torch.arange(len(counts), dtype=torch.int64) + first) >> min(merge, 62)  # floor division
        start = int(index[0])
        merged = torch.zeros(int(index[-1]) - start + 1, dtype=torch.int64).index_add_(0, index - start, counts)
        return start - self.first, merged


class MovingRange:
    """Moving average of the smallest and largest value of each update, the mean of the first hundred.

    It depends on what is one update: whoever wants the same for any batch size gives it single samples.

    Attributes:
        low: average of the smallest, at most 0.
        high: average of the largest, at least 0.
    """

    key = "moving range"

    def __init__(self) -> None:
        self.low = 0.0
        self.high = 0.0
        self._updates = 0

    def update(self, x: Tensor) -> None:
        """Take in the range of `x`."""
        if x.numel() == 0:
            return
        low, high = (float(bound) for bound in torch.aminmax(x.detach()))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise NotFiniteError
        self._updates += 1
        share = max(1 / self._updates, _MOVING)
        self.low += share * (min(low, 0.0) - self.low)
        self.high += share * (max(high, 0.0) - self.high)


class ChannelMean:
    """Mean of each index along one axis, in float64.

    Attributes:
        axis: the axis that is kept.
        mean: (channels,) float64; empty before the first update.
    """

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self._sum = torch.zeros(0, dtype=torch.float64)
        self._count = 0

    @property
    def key(self) -> str:
        """What is gathered, for caching."""
        return f"mean along {self.axis}"

    @property
    def mean(self) -> Tensor:
        """Mean over every other axis."""
        return self._sum / max(self._count, 1)

    def update(self, x: Tensor) -> None:
        """Add the values of `x`."""
        if x.numel() == 0:
            return
        others = [dim for dim in range(x.dim()) if dim != self.axis % x.dim()]
        total = x.detach().sum(dim=others, dtype=torch.float64) if others else x.detach().double()
        if not bool(torch.isfinite(total).all()):
            raise NotFiniteError
        self._sum = total if self._count == 0 else self._sum + total
        self._count += x.numel() // x.shape[self.axis]


class ChannelRange:
    """Smallest, largest and mean square of each index along one axis.

    Attributes:
        axis: the axis that is kept.
        low: (channels,) float64; empty before the first update.
        high: likewise.
    """

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.low = self.high = self._squares = torch.zeros(0, dtype=torch.float64)
        self._count = 0

    @property
    def key(self) -> str:
        """What is gathered, for caching."""
        return f"range along {self.axis}"

    @property
    def square(self) -> Tensor:
        """Mean square over every other axis, (channels,) float64."""
        return self._squares / max(self._count, 1)

    def update(self, x: Tensor) -> None:
        """Take in the values of `x`."""
        if x.numel() == 0:
            return
        rows = x.detach().movedim(self.axis, 0)
        rows = rows.reshape(len(rows), -1)  # a value may have this one axis alone
        low, high = (bound.double().cpu() for bound in torch.aminmax(rows, dim=1))
        squares = rows.double().square().sum(1).cpu()
        if not bool(torch.isfinite(squares).all()):
            raise NotFiniteError
        if self._count:
            low, high, squares = low.minimum(self.low), high.maximum(self.high), squares + self._squares
        self.low, self.high, self._squares = low, high, squares
        self._count += rows.shape[1]


class FirstSamples:
    """The values of the first samples themselves, along the first axis.

    Attributes:
        values: (samples, ...), as far as they came.
    """

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self._parts: list[Tensor] = []

    @property
    def key(self) -> str:
        """What is gathered, for caching."""
        return f"first {self._samples}"

    @property
    def values(self) -> Tensor:
        """All of them in one tensor."""
        return torch.cat(self._parts)

    def update(self, x: Tensor) -> None:
        """Keep what is wanted of `x`."""
        left = self._samples - sum(map(len, self._parts))
        if left > 0:
            self._parts.append(x[:left].detach().clone())
