"""Where the channels of a value can be scaled: what makes them takes the scale in, and so do all layers that read them.

The way back from a value goes through operators that a positive factor passes: relu(x / s) = relu(x) / s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from graphopt.ir.graph import arguments, constant
from graphopt.ir.operators import (
    ADAPTIVE_AVERAGE_POOLS,
    AVERAGE_POOLS,
    MAX_POOLS,
    SCALED_DROPOUTS,
    Family,
    plain_name,
    writes_in_place,
)
from graphopt.passes.layers.channel_path import reads_only_shape, step_back
from graphopt.passes.layers.weighted_call import WeightedCall, other_users, uses, weighted_call
from graphopt.pipeline.plan import Refusal

Absorber = Literal["layer", "norm", "multiply"]

_POOLS = MAX_POOLS | AVERAGE_POOLS | ADAPTIVE_AVERAGE_POOLS
_HOMOGENEOUS = Family("relu", "leaky_relu") | SCALED_DROPOUTS | _POOLS
_NORMS = Family("layer_norm", "rms_norm")


@dataclass(frozen=True, eq=False)
class Scalable:
    """A value whose channels can be scaled.

    Attributes:
        value: what layers read.
        readers: those layers.
        kind: what divides by the scale: a layer, the weights of a norm, or a multiplication that is put in.
        maker: the layer or norm.
    """

    value: fx.Node
    readers: tuple[WeightedCall, ...]
    kind: Absorber
    maker: fx.Node | None = None


def find_sites(gm: fx.GraphModule, *, multiply: bool) -> tuple[list[Scalable], list[Refusal]]:
    """List the values whose channels can be scaled, in graph order, and those that layers read and cannot be.

    Args:
        gm: the graph.
        multiply: whether a multiplication may be put in where nothing takes the scale in.
    """
    sites, refusals = [], []
    for value in gm.graph.nodes:
        calls = (weighted_call(user, gm) for user in value.users)
        readers = tuple(call for call in calls if call is not None and call.input is value)
        if not readers or readers[0].in_features < 2:
            continue
        found = _scalable(gm, value, readers, multiply)
        if isinstance(found, Scalable):
            sites.append(found)
        else:
            refusals.append(Refusal(value.name, found))
    return sites, refusals


def _scalable(gm: fx.GraphModule, value: fx.Node, readers: tuple[WeightedCall, ...], multiply: bool) -> Scalable | str:
    axis = readers[0].input_axis
    for call in readers:
        if call.input_axis != axis:
            return f"`{readers[0].node.name}` and `{call.node.name}` read its channels along different axes"
        if others := other_users(call, gm):
            return f"the weight of `{call.node.name}` is shared with `{others[0].name}`"
    if value.op != "call_function":
        return "it is an input of the program"
    found = _maker(gm, value, {call.node for call in readers}, axis)
    if isinstance(found, str):
        products = all("conv" not in call.kind for call in readers)
        return Scalable(value, readers, "multiply") if multiply and products else found
    kind: Absorber = "norm" if found in _NORMS else "layer"
    return Scalable(value, readers, kind, found)


def _maker(gm: fx.GraphModule, value: fx.Node, readers: set[fx.Node], axis: int) -> fx.Node | str:
    """Return the layer or norm that can divide the channels of a value, or why there is none."""
    node, followers, at = value, readers, axis
    while True:
        others = [user for user in node.users if user not in followers and not reads_only_shape(user, node)]
        if others:
            return f"the output of `{node.name}` has another reader (`{others[0].name}`)"
        call = weighted_call(node, gm)
        if call is not None:
            return _why_no_layer(gm, call, at) or node
        if node in _NORMS:
            return _why_no_norm(gm, node, at) or node
        step = _step(node, at)
        if step is None:
            return f"`{node.name}` does not pass a factor of its channels"
        followers, (node, at) = {node}, step


def _step(node: fx.Node, axis: int) -> tuple[fx.Node, int] | None:
    if node.op != "call_function" or writes_in_place(node):
        return None
    source = node.args[0] if node.args else None
    if isinstance(source, fx.Node) and node in _HOMOGENEOUS:
        slope, rank = arguments(node, ()).get("negative_slope", 0.0), node.meta["val"].dim()
        pooled = int(plain_name(node)[-2]) if node in _POOLS else 0  # axes, the last: of `max_pool2d` two
        return (source, axis) if axis < rank - pooled and not isinstance(slope, fx.Node) else None
    moved = step_back(node, axis)
    return None if moved is None or moved[1] is None else (moved[0], moved[1])


def _why_no_layer(gm: fx.GraphModule, call: WeightedCall, axis: int) -> str:
    if axis != call.output_axis:
        return f"it runs along axis {axis}, `{call.node.name}` makes its features on axis {call.output_axis}"
    if others := other_users(call, gm):
        return f"the weight of `{call.node.name}` is shared with `{others[0].name}`"
    if call.bias is not None and len(uses(gm, str(call.bias.target))) > 1:
        return f"the bias of `{call.node.name}` is shared"
    return ""


def _why_no_norm(gm: fx.GraphModule, node: fx.Node, axis: int) -> str:
    given = arguments(node, ())
    if len(given["normalized_shape"]) != 1 or axis != node.meta["val"].dim() - 1:
        return f"`{node.name}` does not normalise its channels alone"
    if given.get("weight") is None:
        return f"`{node.name}` has no weight"
    for name in ("weight", "bias"):
        read = given.get(name)
        if read is None:
            continue
        tensor = constant(read, gm)
        if not isinstance(tensor, torch.Tensor):
            return f"the {name} of `{node.name}` is computed"
        if len(uses(gm, str(read.target))) > 1:
            return f"the {name} of `{node.name}` is shared"
    return ""
