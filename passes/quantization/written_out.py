"""Finds hard-sigmoid that a model writes out: `relu6(x + 3) / 6`, and `relu6(x + 3)` whose division was folded away.

Known: any clamp to 0 and 6 (relu6, hardtanh, clamp), a division by 6 or a product with 1/6.
"""

from __future__ import annotations

from torch import fx

from graphopt.ir.graph import arguments
from graphopt.ir.operators import plain_name
from graphopt.passes.quantization.kernels import clamp_range

_SIXTH = 1 / 6


def hard_sigmoid_of(node: fx.Node) -> fx.Node | None:
    """Return x where a node computes `clamp(x + 3, 0, 6) / 6`."""
    factor = {"div": 6.0, "mul": _SIXTH}.get(plain_name(node))
    if factor is None or "rounding_mode" in node.kwargs:
        return None
    clamp, number = node.args[:2]
    taken = isinstance(number, int | float) and abs(number - factor) < 1e-6
    return _of_clamp(clamp) if taken and isinstance(clamp, fx.Node) else None


def six_hard_sigmoids_of(node: fx.Node) -> fx.Node | None:
    """Return x where a node computes `clamp(x + 3, 0, 6)` and nobody takes a sixth of it."""
    return None if any(hard_sigmoid_of(user) is not None for user in node.users) else _of_clamp(node)


def _of_clamp(clamp: fx.Node) -> fx.Node | None:
    shifted = clamp.args[0] if clamp_range(clamp) == (0.0, 6.0) else None
    if not isinstance(shifted, fx.Node) or plain_name(shifted) != "add" or arguments(shifted, ()).get("alpha", 1) != 1:
        return None
    x, number = shifted.args[:2]
    return x if isinstance(x, fx.Node) and isinstance(number, int | float) and number == 3 else None
