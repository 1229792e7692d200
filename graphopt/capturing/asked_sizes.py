"""What a trace asked of the sizes of dynamic axes, and the sizes for which it would have heard another answer.

    if x.shape[0] < 16: ...        the trace of 2 rows goes one way, and torch notes the guard `s < 16`        16
    torch.split(x, 8)              as many parts as the example had                `(s + 7) // 8 == 1`        9

Programs do not check what was asked, and most of it is harmless: how a tensor lies in memory, say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.ir.graph import fake_mode_of
from graphopt.ir.torch_internals import SMALLEST_TRACED, holds_at

_LARGEST = 4096  # sizes that are looked at


@dataclass(frozen=True)
class AskedSize:
    """A size that was not traced.

    Attributes:
        places: of which axes it is, by the number of the tensor among the inputs: they are of one size.
        size: the smallest that is traced as any for which what was asked does not hold.
    """

    places: tuple[tuple[int, int], ...]
    size: int


def asked_sizes(traced: fx.GraphModule) -> list[AskedSize]:
    """List the sizes for which a fresh trace might be another, one for each guard on a single axis."""
    env = fake_mode_of(traced).shape_env
    if env is None:
        return []
    values = [node.meta["val"] for node in traced.graph.find_nodes(op="placeholder")]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    places: dict[Any, list[tuple[int, int]]] = {}
    for number, tensor in enumerate(tensors):
        for axis, size in enumerate(tensor.shape):
            if isinstance(size, torch.SymInt):
                places.setdefault(size.node.expr, []).append((number, axis))
    found: dict[AskedSize, None] = {}
    for guard in env.guards:
        symbols = guard.expr.free_symbols
        if len(symbols) == 1 and (symbol := next(iter(symbols))) in places:
            beyond = _smallest_beyond(guard.expr, symbol)
            if beyond is not None:
                found[AskedSize(tuple(places[symbol]), beyond)] = None
    return list(found)


def _smallest_beyond(guard: Any, symbol: Any) -> int | None:
    """Return the smallest size for which a guard does not hold, None where it holds for all that are looked at."""
    return next((size for size in range(SMALLEST_TRACED, _LARGEST + 1) if not holds_at(guard, symbol, size)), None)
