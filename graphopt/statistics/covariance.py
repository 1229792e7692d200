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
from graphopt.statistics.calibration import Calibration
from graphopt.statistics.moments import Moments, representative

T = TypeVar("T")

MEMORY = 1 << 30  # bytes of matrices held at once
WIDEST = 8192  # features; a wider matrix would take more than half of MEMORY
_BATCH = 32  # samples run at once


class Covariance(Moments):
    """Moments of the features along one axis of a value, over samples and positions.

    Attributes:
        axis: the axis of the value that the features run along.
        step: only every `step[i]`-th position along the i-th axis behind the features counts: the stride of a 1x1
            convolution.
    """

    def __init__(self, axis: int, step: Sequence[int] = ()) -> None:
        super().__init__()
        self.axis = axis
        self.step = tuple(step)

    @property
    def key(self) -> str:
        """What is gathered, for caching."""
        return f"covariance/{self.axis}/{self.step}"

    def update(self, x: torch.Tensor) -> None:
        """Take in one batch.

        Raises:
            NotFiniteError: `x` holds NaN or infinities, or what squares to that.
        """
        for index, step in enumerate(self.step):
            size = x.shape[self.axis + 1 + index]
            x = x.index_select(self.axis + 1 + index, torch.arange(0, size, step, device=x.device))
        rows = x.detach().movedim(self.axis, -1).reshape(-1, x.shape[self.axis])
        chosen = representative(len(rows), x.shape[0] if self.axis else 1)
        self.add(rows[chosen].to(torch.promote_types(x.dtype, torch.float32)))


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
