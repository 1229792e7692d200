"""Covariance of the values at a node: which directions of an activation carry signal.

Gathered in one run over the calibration samples for all nodes that are asked about, in several only where their
matrices would not fit in `MEMORY` at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from graphopt.ir.program import Program
from graphopt.pipeline.context import Context
from graphopt.quantization.histogram import NotFiniteError
from graphopt.statistics.calibration import Calibration

T = TypeVar("T")

MEMORY = 1 << 30  # bytes of matrices held at once
WIDEST = 8192  # features; a wider matrix would take more than half of MEMORY
_ROWS_PER_SAMPLE = 64  # positions of one sample (pixels, tokens) are alike: more cost time and say little
_BATCH = 32  # samples run at once


class Covariance:
    """Mean and second moments of the features along one axis, over samples and positions.

    Attributes:
        axis: the axis of the value that the features run along.
        step: only every `step[i]`-th position along the i-th axis behind the features counts: the stride of a 1x1
            convolution.
        rows: number of feature vectors taken in.
    """

    def __init__(self, axis: int, step: Sequence[int] = ()) -> None:
        self.axis = axis
        self.step = tuple(step)
        self.rows = 0
        self._shift = torch.zeros(0)  # (features,) about the mean: the products lose no digits to it
        self._sum = torch.zeros(0)  # (features,) of values less the shift
        self._products = torch.zeros(0)  # (features, features) likewise

    @property
    def key(self) -> str:
        """What is gathered, for caching."""
        return f"covariance/{self.axis}/{self.step}"

    def update(self, x: torch.Tensor) -> None:
        """Take in one batch.

        Raises:
            NotFiniteError: `x` holds NaN or infinities.
        """
        rows = self._feature_vectors(x.detach())  # (rows, features)
        if not bool(torch.isfinite(rows).all()):
            raise NotFiniteError
        if rows.shape[0] == 0:
            return
        if self.rows == 0:
            features = rows.shape[1]
            self._shift = rows.mean(0)
            self._sum = torch.zeros(features, dtype=torch.float64)
            self._products = torch.zeros(features, features, dtype=torch.float64)
        centred = rows - self._shift
        self.rows += rows.shape[0]
        self._sum += centred.sum(0, dtype=torch.float64)
        self._products += (centred.T @ centred).double()

    def mean(self) -> torch.Tensor:
        """Return the mean (features,) in float64."""
        return self._shift.double() + self._sum / self.rows

    def about_mean(self) -> torch.Tensor:
        """Return the covariance (features, features) in float64."""
        offset = self._sum / self.rows
        return self._products / self.rows - torch.outer(offset, offset)

    def about_zero(self) -> torch.Tensor:
        """Return the second moments (features, features) in float64."""
        mean = self.mean()
        return self.about_mean() + torch.outer(mean, mean)

    def _feature_vectors(self, x: torch.Tensor) -> torch.Tensor:
        for index, step in enumerate(self.step):
            size = x.shape[self.axis + 1 + index]
            x = x.index_select(self.axis + 1 + index, torch.arange(0, size, step))
        if not x.is_floating_point() or x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        samples = x.shape[0] if self.axis else 1
        rows = x.movedim(self.axis, -1).reshape(-1, x.shape[self.axis])
        most = _ROWS_PER_SAMPLE * samples
        if rows.shape[0] <= most:
            return rows
        return rows[torch.arange(most) * rows.shape[0] // most]


def gather_covariances(
    ctx: Context, program: Program, pass_name: str, wanted: Sequence[tuple[str, Covariance, int]], *, samples: int
) -> Iterator[tuple[str, Covariance]]:
    """Fill covariances of nodes and yield them with the node's name, in an order that keeps memory bounded.

    Args:
        ctx: whose samples are run.
        program: what they are run through.
        pass_name: for messages.
        wanted: node name, empty covariance, number of features. Equal requests should be given once.
        samples: at most this many.

    Raises:
        DataError: there are no samples, or they do not fit.
    """
    source = ctx.need_samples(pass_name, "to see which directions of an activation carry signal")
    for group in portions(wanted, lambda request: 8 * request[2] ** 2):
        calibration = Calibration(program, source, limit=samples, batch_size=_BATCH, progress=ctx.progress)
        filled = calibration.gather((name, covariance) for name, covariance, _ in group)
        yield from zip((name for name, _, _ in group), filled, strict=True)


def portions(wanted: Iterable[T], held: Callable[[T], int]) -> Iterator[list[T]]:
    """Split requests so that what those of each portion hold, in bytes, fits in MEMORY; a larger one goes alone."""
    portion: list[T] = []
    total = 0
    for request in wanted:
        size = held(request)
        if portion and total + size > MEMORY:
            yield portion
            portion, total = [], 0
        portion.append(request)
        total += size
    if portion:
        yield portion
