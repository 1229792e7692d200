"""BatchNorm re-estimation: running statistics as the exact mean and variance of what a network sees now.

Removing channels or factorising weights changes the distribution at every BatchNorm after it, and most of the
accuracy lost at once is lost there. Momentum averages would forget the first batches and take the mean of batch
variances for the variance; here moments are pooled exactly (Chan, Golub, LeVeque 1983, equation 2.1), each
BatchNorm seeing inputs that the ones before it normalised by batch (PreciseBN: Wu and Johnson 2021, section 3).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from graphopt.ir.program import Program
from graphopt.ir.walker import Walker
from graphopt.statistics.moments import Moments

_BATCH_NORM = torch.ops.aten.batch_norm.default
_INPUT, _MEAN, _VARIANCE, _TRAINING = 0, 3, 4, 5  # positions among its arguments


def batch_norms(program: Program) -> list[fx.Node]:
    """List the BatchNorm calls of `program` that keep running statistics."""
    return [
        node
        for node in program.graph.nodes
        if node.target is _BATCH_NORM and all(isinstance(node.args[at], fx.Node) for at in (_MEAN, _VARIANCE))
    ]


def fewest_samples(program: Program) -> int:
    """Return of how many samples its BatchNorms can train: 2 where one sees a single value of a channel in a sample.

    There is no unbiased variance of one value, and it would stay in the running one.
    """
    shapes = [node.all_input_nodes[_INPUT].meta["val"].shape for node in batch_norms(program)]
    return 2 if any(all(isinstance(size, int) and size == 1 for size in shape[2:]) for shape in shapes) else 1


def estimate_statistics(program: Program, batches: Iterable[tuple[torch.Tensor, ...]]) -> dict[str, torch.Tensor]:
    """Return the mean and the unbiased variance of every BatchNorm's input over all of `batches`, by buffer name.

    A BatchNorm that runs several times pools what all its calls see. Forward only; Dropout stays off.

    Args:
        program: in evaluation mode; it is not changed.
        batches: flat inputs, at least two values per channel each.

    Returns:
        New values of the running means and variances, in the dtype and on the device they have.
    """
    observer = _Observer(program)
    for batch in batches:
        observer.run(batch)
    return observer.statistics()


class _Observer(Walker):
    """Runs a program with batch statistics and pools the moments of every BatchNorm's input."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self._watched = set(batch_norms(program))
        self._moments: dict[tuple[str, str], Moments] = {}

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call; normalise by the batch if it is a BatchNorm, and note the moments of what enters."""
        if node in self._watched:
            key = (_target(node.args[_MEAN]), _target(node.args[_VARIANCE]))
            pool_channels(self._moments.setdefault(key, Moments()), args[_INPUT])
            args = _by_batch(args)
        return super().call(node, args, kwargs)

    def statistics(self) -> dict[str, torch.Tensor]:
        """Return running means and variances by buffer name."""
        stored = self.program.state_dict()
        found = {}
        for (mean, variance), moments in self._moments.items():
            found[mean] = moments.mean.to(stored[mean])
            found[variance] = (moments.scatter / max(moments.rows - 1, 1)).to(
                stored[variance]
            )  # unbiased, as it is stored
        return found


def pool_channels(moments: Moments, values: torch.Tensor) -> None:
    """Take in one batch, (samples, channels, ...), channel by channel, on the CPU."""
    wide = values if values.dtype in (torch.float32, torch.float64) else values.float()
    axes = [axis for axis in range(wide.dim()) if axis != 1]
    variance, mean = (t.to("cpu", torch.float64) for t in torch.var_mean(wide, axes, correction=0))
    rows = wide.numel() // wide.shape[1]
    moments.pool(rows, mean, variance * rows)


def _by_batch(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of a BatchNorm call that normalises by its batch and updates nothing."""
    changed = list(args)
    changed[_MEAN] = changed[_VARIANCE] = None
    changed[_TRAINING] = True
    return tuple(changed)


def _target(node: Any) -> str:
    return str(node.target)
