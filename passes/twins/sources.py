"""The weights of another program of the same model, found by the operator that a layer descends from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphopt.ir.graph import constant
from graphopt.ir.program import Program
from graphopt.ir.provenance import origin
from graphopt.passes.layers.weighted_call import WeightedCall, layer_call
from graphopt.passes.layers.weights import by_taps

_EMBEDDING = torch.ops.aten.embedding.default


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer or the table of an embedding: what is stored of it, None where it is computed or there is none."""

    weight: Tensor | None
    bias: Tensor | None
    call: WeightedCall | None


class LayerWeights:
    """Weights of layers and tables of embeddings in a program, none in None; a layer may have become several."""

    def __init__(self, program: Program | None) -> None:
        self._known: dict[str, list[_Layer]] = {}
        if program is None:
            return
        gm = program.graph_module
        for node in program.graph.nodes:
            descent, call = origin(node), layer_call(node, gm)
            weight = node.args[0] if node.target is _EMBEDDING else None if call is None else call.weight
            if descent is not None and weight is not None:
                layer = _Layer(constant(weight, gm), None if call is None else constant(call.bias, gm), call)
                self._known.setdefault(descent.node, []).append(layer)

    def of(self, node: fx.Node) -> list[Tensor]:
        """List the stored weights of the layers that descend from where a call does."""
        return [layer.weight.detach() for layer in self._beside(node) if layer.weight is not None]

    def rows(self, node: fx.Node) -> list[Tensor]:
        """List the same as (rows, columns), a row for each output, a column for each input and tap."""
        return [
            by_taps(layer.call, layer.weight.detach()).flatten(0, 1).flatten(1)
            for layer in self._beside(node)
            if layer.weight is not None and layer.call is not None
        ]

    def trained(self, node: fx.Node, *, bias: bool = False) -> bool:
        """Whether a call descends from a layer, and its weight is trained: one that is computed counts as such.

        Args:
            node: the call.
            bias: whether its bias is meant, which is trained with the weight unless it is frozen by itself.
        """
        return any(_trains(one.weight) and (not bias or _trains(one.bias)) for one in self._beside(node))

    def _beside(self, node: fx.Node) -> list[_Layer]:
        descent = origin(node)
        return [] if descent is None else self._known.get(descent.node, [])


def _trains(stored: Tensor | None) -> bool:
    return stored is None or (isinstance(stored, torch.nn.Parameter) and stored.requires_grad)
