"""Which axis of a value holds its channels, and of an output its classes: that of the layer it comes from.

    conv1d(x) (N, classes, T)                     1
    linear(x) (N, T, classes)                     2
    linear(x).transpose(1, 2)                     1
    softmax(x, 1) (N, classes, H, W)              1

Where no layer tells, it is by custom the last of up to three axes and the second of more.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile

import torch
from torch import fx

from graphopt.distillation.cuts import WEIGHTED
from graphopt.ir.graph import arguments
from graphopt.ir.operators import (
    ALL_CONVOLUTIONS,
    LOG_SOFTMAXES,
    NORMALISATIONS,
    REORDERS,
    RESHAPES,
    SOFTMAXES,
    Family,
)

_LAST = Family("linear", "layer_norm", "native_layer_norm", "rms_norm", "embedding")  # their channels come last


def axis_of_channels(node: fx.Node) -> int:
    """Return the axis of the channels of what a node computes; by custom where no layer tells."""
    dimensions = _dimensions(node)
    return _traced(node, _of_layer) or (1 if dimensions > 3 else max(dimensions - 1, 0))


def axis_of_classes(node: fx.Node) -> int | None:
    """Return the axis that a softmax is over, else that of the channels; None where nothing tells."""

    def told(one: fx.Node) -> int | None:
        over_classes = one in SOFTMAXES or one in LOG_SOFTMAXES
        return arguments(one, ("dim",))["dim"] % _dimensions(one) if over_classes else _of_layer(one)

    return _traced(node, told)


def _traced(node: fx.Node, told: Callable[[fx.Node], int | None]) -> int | None:
    """Go back to what tells an axis of its own, and follow that to here."""
    passed: list[fx.Node] = []
    current: fx.Node | None = node
    while current is not None and current.op == "call_function" and told(current) is None:
        if current in WEIGHTED:
            return None
        passed.append(current)
        current = _before(current)
    if current is None or current.op != "call_function":
        return None
    axis = told(current)
    for following in reversed(passed):
        axis = None if axis is None else _moved(axis, current, following)
        current = following
    return axis


def _of_layer(node: fx.Node) -> int | None:
    if node in _LAST:
        return _dimensions(node) - 1
    return 1 if node in ALL_CONVOLUTIONS or node in NORMALISATIONS else None


def _before(node: fx.Node) -> fx.Node | None:
    return next((source for source in node.all_input_nodes if source.op != "get_attr"), None)


def _moved(axis: int, before: fx.Node, node: fx.Node) -> int | None:
    """Return where an axis of what a node reads is in what it computes, None where it is no longer whole."""
    if node in REORDERS:
        probe = torch.empty([*range(_dimensions(before))], device="meta")  # of sizes that tell the axes apart
        return list(node.target(probe, *node.args[1:], **node.kwargs).shape).index(axis)  # type: ignore[operator]
    if node in RESHAPES:
        sizes, others = ([*map(str, one.meta["val"].shape)] for one in (before, node))
        if axis < _shared(sizes, others):
            return axis
        behind = len(sizes) - axis
        return len(others) - behind if behind <= _shared(sizes[::-1], others[::-1]) else None
    return axis if _dimensions(before) == _dimensions(node) else None


def _shared(sizes: list[str], others: list[str]) -> int:
    """Return how many axes two shapes begin with that are the same."""
    return len([*takewhile(lambda pair: pair[0] == pair[1], zip(sizes, others, strict=False))])


def _dimensions(node: fx.Node) -> int:
    value = node.meta.get("val")
    return int(value.dim()) if isinstance(value, torch.Tensor) else -1
