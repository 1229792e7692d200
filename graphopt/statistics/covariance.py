"""Covariance of the values at a node: which directions of an activation carry signal.

Gathered in one run over the calibration samples for all nodes that are asked about: node by node for all samples, so
that one matrix is held at a time; or sample by sample, where all matrices take less than the values of all samples
between two nodes. Neither takes more than `MEMORY`: where both would, there are several runs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from graphopt.data.batches import Batch
from graphopt.ir.program import Program
from graphopt.ir.walker import Walker
from graphopt.pipeline.context import Context, Progress
from graphopt.statistics.calibration import Calibration, check_batch, read_batches, update
from graphopt.statistics.memory import peak_bytes_per_sample
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

    Whoever lets go of one before asking for the next holds one.

    Args:
        ctx: whose samples are run.
        program: what they are run through.
        pass_name: for messages.
        wanted: node name, empty covariance, of which a copy is filled, number of features. Equal requests should be
            given once.
        samples: at most this many.

    Raises:
        DataError: there are no samples, or they do not fit.
    """
    source = ctx.need_samples(pass_name, "to see which directions of an activation carry signal")
    matrices = [8 * features**2 for _, _, features in wanted]
    if samples * peak_bytes_per_sample(program) + max(matrices, default=0) < min(sum(matrices), MEMORY):
        batches = read_batches(program, source, limit=samples, batch_size=_BATCH)
        yield from _node_by_node(program, wanted, batches, ctx.progress)
        return
    for group in portions(wanted, lambda request: 8 * request[2] ** 2):
        calibration = Calibration(program, source, limit=samples, batch_size=_BATCH, progress=ctx.progress)
        filled = calibration.gather((name, copy.copy(empty)) for name, empty, _ in group)
        yield from zip((name for name, _, _ in group), filled, strict=True)


def _node_by_node(
    program: Program, wanted: Sequence[tuple[str, Covariance, int]], batches: Sequence[Batch], progress: Progress
) -> Iterator[tuple[str, Covariance]]:
    for index, batch in enumerate(batches):
        check_batch(program, batch, index)
    waiting: dict[str, list[Covariance]] = {}
    for name, empty, _ in wanted:
        waiting.setdefault(name, []).append(empty)
    walker = Walker(program).start(batches)
    nodes = list(program.graph.nodes)
    for node in progress.track(nodes, "calibrating", len(nodes)):
        walker.step()
        for empty in waiting.pop(node.name, ()):
            covariance = copy.copy(empty)
            for index, value in enumerate(walker.values[node]):
                update(covariance, value, node, node.name, index)
            yield node.name, covariance
            del covariance  # or it would wait for the next
        if not waiting:
            return


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
