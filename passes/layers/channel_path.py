"""Follow a channel axis backwards through views and permutations to the layer that makes the channels."""

from __future__ import annotations

import itertools
import math
from typing import Any

from torch import fx

from graphopt.ir.operators import COPIES, REORDERS, RESHAPES, SIZES, Family, writes_in_place
from graphopt.passes.layers.reordering import axes_before
from graphopt.passes.layers.weighted_call import WeightedCall, weighted_call

_RESHAPES = RESHAPES | COPIES
_LIKE_ANOTHER = Family("view_as", "reshape_as", "expand_as")


def path_to_layer(
    value: fx.Node, reader: fx.Node, axis: int | None, gm: fx.GraphModule
) -> tuple[WeightedCall | None, str]:
    """Find the layer whose output features run along `axis` of `value`.

    Args:
        value: where to start.
        reader: the user of `value` that wants to be folded; the values on the path must have no other.
        axis: the axis to follow; None when it does not matter (one number for all elements).
        gm: the module that holds the weights.

    Returns:
        The layer and why what follows cannot be folded into it ("" if it can); (None, "") if there is no layer.
    """
    path = [value]
    while True:
        node = path[-1]
        call = weighted_call(node, gm)
        if call is not None:
            return call, _obstacle([reader, *path], call, axis)
        step = step_back(node, axis)
        if step is None:
            return None, ""
        source, axis = step
        path.append(source)


def _obstacle(path: list[fx.Node], call: WeightedCall, axis: int | None) -> str:
    for follower, node in itertools.pairwise(path):
        others = (user for user in node.users if user is not follower and not reads_only_shape(user, node))
        other = next(others, None)
        if other is not None:
            what = "an output of the program" if other.op == "output" else f"`{other.name}`"
            return f"the output of `{node.name}` has another reader ({what})"
    if axis is not None and axis != call.output_axis:
        return f"it runs along axis {axis}, `{call.node.name}` makes its features on axis {call.output_axis}"
    return ""


def reads_only_shape(user: fx.Node, node: fx.Node) -> bool:
    """Whether `user` would return the same for any other values in `node`."""
    return user in SIZES or (user in _LIKE_ANOTHER and user.args[0] is not node)


def step_back(node: fx.Node, axis: int | None) -> tuple[fx.Node, int | None] | None:
    """Return the input of a view-like `node` and where `axis` lies in it."""
    if writes_in_place(node) or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source = node.args[0]
    if node in REORDERS:
        return source, None if axis is None else axes_before(node, source)[axis]
    if node not in _RESHAPES:
        return None
    if axis is None:
        return source, None
    before, after = source.meta["val"].shape, node.meta["val"].shape
    for candidate in range(len(before)):
        if _equal(before[candidate], after[axis]) and _equal(
            math.prod(before[candidate + 1 :]), math.prod(after[axis + 1 :])
        ):
            return source, candidate
    return None


def _equal(one: Any, other: Any) -> bool:
    """Whether two sizes are the same number or the same expression, without guarding on it."""
    return str(one) == str(other)
