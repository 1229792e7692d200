"""What a trace asked of the sizes of dynamic axes, and the sizes for which it would have heard another answer.

    if x.shape[0] < 16: ...             the trace of 2 rows goes one way, and torch notes the guard `s < 16`      16
    torch.split(x, 8)                   as many parts as the example had              `(s + 7) // 8 == 1`         9
    if x.shape[1] != y.shape[1]: ...    of 5 and 7                                    `s != t`                    7, 7

Programs do not check what was asked, and most of it is harmless: how a tensor lies in memory, say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from graphopt.ir.graph import fake_mode_of
from graphopt.ir.signature import TensorSpec
from graphopt.ir.symbolic import computed, holds
from graphopt.ir.torch_internals import SMALLEST_TRACED

_LARGEST = 4096  # sizes that are looked at, and combinations of sizes of several axes
_SPREAD = (0, 1, 2, 4, 8, 16, 32, 64)  # which of the nearest are tried: a model may fail at some

Array = NDArray[np.int64]
Place = tuple[int, int]  # the number of a tensor among the inputs, and of its axis


@dataclass(frozen=True)
class OtherSizes:
    """Sizes that were not traced.

    Attributes:
        sizes: of all axes that depend on what was asked about.
        asked: the first axes of each of these.
    """

    sizes: dict[Place, int]
    asked: tuple[Place, ...]

    @property
    def of_batch(self) -> bool:
        """Whether a first axis is among those asked about."""
        return any(axis == 0 for _, axis in self.asked)


class AskedSizes:
    """The questions of a fresh trace about sizes of its inputs."""

    def __init__(self, traced: fx.GraphModule) -> None:
        """Read them, before the graph is rewritten."""
        values = [node.meta["val"] for node in traced.graph.find_nodes(op="placeholder")]
        shapes: list[Any] = [value.shape for value in values if isinstance(value, torch.Tensor)]
        self._axes: dict[Place, Any] = {
            (number, axis): size.node.expr
            for number, shape in enumerate(shapes)
            for axis, size in enumerate(shape)
            if isinstance(size, torch.SymInt) and not size.node.expr.is_number
        }
        env = fake_mode_of(traced).shape_env
        symbols = {symbol for size in self._axes.values() for symbol in size.free_symbols}
        self._traced = {symbol: int(env.backed_var_to_val[symbol]) for symbol in symbols} if env else {}
        guards = dict.fromkeys(env.replace(guard.expr) for guard in env.guards) if env else {}
        self._guards = [guard for guard in guards if guard.free_symbols and guard.free_symbols <= symbols]

    def others(self, inputs: Sequence[TensorSpec]) -> Iterator[list[OtherSizes]]:
        """Go through the questions: sizes in range for which each has another answer, near to the traced ones first.

        They are of one axis, the others being as traced, or in a grid around these where there are none.
        """
        for guard in self._guards:
            axes = {place: size for place, size in self._axes.items() if size.free_symbols & guard.free_symbols}
            firsts = {s: next(place for place in axes if s in axes[place].free_symbols) for s in guard.free_symbols}
            symbols = sorted(firsts, key=lambda symbol: (firsts[symbol], str(symbol)))
            traced = np.array([self._traced[symbol] for symbol in symbols])
            for points in (_lines(traced), _grid(traced)):  # (points, symbols)
                sizes = {**self._traced, **dict(zip(symbols, points.T, strict=True))}
                values = np.stack([computed(size, sizes) for size in axes.values()])  # (axes, points)
                unlike = np.logical_not(holds(guard, sizes)) & _in_range(values, [*axes], inputs)
                unlike &= (points != traced).any(1)
                near = np.flatnonzero(unlike)[np.argsort(abs(points[unlike] - traced).sum(1), kind="stable")]
                if len(near):
                    asked = tuple(firsts[symbol] for symbol in symbols)
                    chosen = [near[index] for index in _SPREAD if index < len(near)]
                    yield [OtherSizes(dict(zip(axes, values[:, i].tolist(), strict=True)), asked) for i in chosen]
                    break


def _lines(traced: Array) -> Array:
    """Return points of which one coordinate is any, the others as traced."""
    lines = []
    for index, size in enumerate(traced):
        line = np.tile(traced, (max(_LARGEST, 2 * size), 1))
        line[:, index] = np.arange(1, len(line) + 1)
        lines.append(line)
    return np.concatenate(lines)


def _grid(traced: Array) -> Array:
    """Return the points around the traced one."""
    side = int(_LARGEST ** (1 / len(traced)))
    starts = np.maximum(1, traced - side // 2)
    return np.stack(np.meshgrid(*(np.arange(start, start + side) for start in starts)), -1).reshape(-1, len(traced))


def _in_range(values: Array, places: Sequence[Place], inputs: Sequence[TensorSpec]) -> Any:
    """Say for which points all axes have sizes that they may have, and are traced as any."""
    ranges = [inputs[number].range_of(axis) for number, axis in places]
    least = np.array([[max(sizes.least, SMALLEST_TRACED)] for sizes in ranges])
    most = np.array([[np.inf if sizes.most is None else sizes.most] for sizes in ranges])
    return ((least <= values) & (values <= most)).all(0)
