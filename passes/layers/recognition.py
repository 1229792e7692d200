"""Which calls are layers, whether their weight is stored as it is or not."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import fx

from graphopt.ir.aliasing import Storages
from graphopt.ir.operators import PRODUCTS, RECURRENT
from graphopt.ir.regions import inside, regions
from graphopt.passes.layers.constants import ancestors, find_all_constants, sources, worth_storing
from graphopt.passes.layers.weighted_call import WeightedCall, is_layer, uses, weighted_call

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


class Unweighted:
    """Says why a layer of a graph has no stored weight that a pass could change."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm

    def why(self, call: WeightedCall | None) -> str:
        """Return why a layer (`layer_call`) is no `weighted_call`, "" if it is one."""
        if call is None:
            return "it is no product with a stored matrix"
        if weighted_call(call.node, self._gm) is not None:
            return ""
        if getattr(call.weight.target, "namespace", "") == "graphopt":
            return f"its weight is stored as integers (`{call.weight.name}`): int8 and weights come last"
        for what, read in (("weight", call.weight), ("bias", call.bias)):
            if read is not None and read.op != "get_attr":
                return self.why_computed(what, read)
        if call.scaled:
            return "its product or its bias is multiplied by a factor (alpha, beta)"
        return "its input is stored" if call.input.op == "get_attr" else "it is no product with a stored matrix"

    def why_of_product(self, node: fx.Node) -> str:
        """Return why a product of a value and what is computed from stored tensors is no layer; "" where it is none."""
        if node not in PRODUCTS:
            return ""
        operands = [value for value in node.all_input_nodes if value in self._constants and value.op != "get_attr"]
        return self.why_computed("weight", operands[-1]) if operands else ""

    def why_computed(self, what: str, read: fx.Node) -> str:
        """Say what a weight that is computed depends on, and that `fold` stores it where it does."""
        if read not in self._constants:
            return f"its {what} is computed at run time by `{read.name}`"
        chosen, refused = self._storable
        made = f"its {what} is computed from stored tensors by `{read.name}`"
        if read in chosen:  # no backticks: counting refusals leaves names in them out
            return f"{made}: put fold before, which stores it"
        if read.name in refused:
            return f"{made}, and {refused[read.name]}"
        path = ancestors([read])
        others = [user for source in sources([read]) for user in uses(self._gm, str(source.target)) if user not in path]
        return f"{made}, and what it is computed from is shared with `{others[0].name}`" if others else made

    @functools.cached_property
    def _storages(self) -> Storages:
        return Storages(self._gm.graph)

    @functools.cached_property
    def _constants(self) -> set[fx.Node]:
        return find_all_constants(self._gm, self._storages)

    @functools.cached_property
    def _storable(self) -> tuple[set[fx.Node], dict[str, str]]:
        chosen, refusals = worth_storing(self._gm, self._constants, self._storages)
        return set(chosen), {refusal.site: refusal.reason for refusal in refusals}


def _stored(graph: fx.Graph) -> set[fx.Node]:
    """Return what is stored, and what is computed from that alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr" or (node.op == "call_function" and sources and found.issuperset(sources)):
            found.add(node)
    return found
