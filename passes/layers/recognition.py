"""Which calls are layers, whether their weight is stored as it is or not."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from graphopt.ir.operators import PRODUCTS, RECURRENT
from graphopt.ir.regions import inside, regions
from graphopt.passes.layers.weighted_call import WeightedCall, is_layer, weighted_call

_WITH_WEIGHTS = PRODUCTS | RECURRENT  # where one operand is stored


class Layers:
    """The calls of a graph that are layers: convolutions, products with stored weights, recurrent ones.

    A weight may be stored as it is, or computed from stored tensors alone: transposed, normalised. Sums without any
    layer are no blocks: `x - mean(x)`, activations with a learned slope. A region in which layers run is one too.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._stored = _stored(gm.graph)
        self._regions = {found.node: inside(found) for found in regions(gm)}
        self._known: dict[fx.Node, bool] = {}

    def __contains__(self, node: fx.Node) -> bool:
        """Whether `node` is a layer."""
        if node not in self._known:
            self._known[node] = self._is_layer(node)
        return self._known[node]

    def inside(self, nodes: Sequence[fx.Node]) -> list[fx.Node]:
        """Return what runs in the regions among `nodes`."""
        return [inner for node in nodes for inner in self._regions.get(node, ())]

    def _is_layer(self, node: fx.Node) -> bool:
        if is_layer(node) or weighted_call(node, self._gm) is not None:
            return True
        if any(is_layer(inner) for inner in self._regions.get(node, ())):
            return True
        return node in _WITH_WEIGHTS and not self._stored.isdisjoint(node.all_input_nodes)


def why_not_weighted(call: WeightedCall | None, gm: fx.GraphModule) -> str:
    """Return why a layer (`layer_call`) is no `weighted_call`, "" if it is one."""
    if call is None:
        return "it is no product with a stored matrix"
    if weighted_call(call.node, gm) is not None:
        return ""
    weight, bias = call.weight, call.bias
    if getattr(weight.target, "namespace", "") == "graphopt":
        return f"its weight is stored as integers (`{weight.name}`): int8 comes last"
    for what, read in (("weight", weight), ("bias", bias)):
        if read is None or read.op == "get_attr":
            continue
        if read in _stored(gm.graph):  # no backticks: counting refusals leaves names in them out
            return f"its {what} is computed from stored tensors by `{read.name}`: put fold before, which stores it"
        return f"its {what} is computed at run time by `{read.name}`"
    if call.scaled:
        return "its product or its bias is multiplied by a factor (alpha, beta)"
    return "its input is stored" if call.input.op == "get_attr" else "it is no product with a stored matrix"


def _stored(graph: fx.Graph) -> set[fx.Node]:
    """Return what is stored, and what is computed from that alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr" or (node.op == "call_function" and sources and found.issuperset(sources)):
            found.add(node)
    return found
