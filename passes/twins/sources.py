"""The weights of another program of the same model, found by the operator that a layer descends from."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from graphopt.ir.graph import constant
from graphopt.ir.program import Program
from graphopt.ir.provenance import origin
from graphopt.passes.layers.weighted_call import WeightedCall, layer_call
from graphopt.passes.layers.weights import by_taps

_EMBEDDING = torch.ops.aten.embedding.default


class LayerWeights:
    """LayerWeights of layers and tables of embeddings in a program, none in None."""

    def __init__(self, program: Program | None) -> None:
        self._known: dict[str, Tensor | None] = {}
        self._calls: dict[str, WeightedCall | None] = {}
        if program is None:
            return
        for node in program.graph.nodes:
            descent, call = origin(node), layer_call(node, program.graph_module)
            weight = node.args[0] if node.target is _EMBEDDING else None if call is None else call.weight
            if descent is not None and weight is not None:
                self._known[descent.node] = constant(weight, program.graph_module)
                self._calls[descent.node] = call

    def of(self, node: fx.Node) -> Tensor | None:
        """Return the stored weight of the layer that a call descends from, None where there is none."""
        descent = origin(node)
        return None if descent is None else self._known.get(descent.node)

    def rows(self, node: fx.Node) -> Tensor | None:
        """Return the same as (rows, columns), a row for each output, a column for each input and tap."""
        descent = origin(node)
        call = None if descent is None else self._calls.get(descent.node)
        weight = self.of(node)
        return None if weight is None or call is None else by_taps(call, weight.detach()).flatten(0, 1).flatten(1)

    def trained(self, node: fx.Node) -> bool:
        """Whether a call descends from a layer, and its weight is trained: one that is computed counts as such."""
        descent = origin(node)
        if descent is None or descent.node not in self._known:
            return False
        weight = self._known[descent.node]
        return weight is None or (isinstance(weight, torch.nn.Parameter) and weight.requires_grad)
