"""Weights of layers that may hold zeros of no account, and putting such weights in place."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.ir.editor import Editor
from graphopt.ir.graph import constant, tensor_attribute
from graphopt.ir.program import Program
from graphopt.ir.zeros import hold
from graphopt.passes.layers.recognition import Layers, Unweighted
from graphopt.passes.layers.weighted_call import (
    IN_A_REGION,
    WeightedCall,
    is_layer,
    layer_call,
    regions_with_layers,
    uses,
    weighted_call,
)
from graphopt.pipeline.globs import is_named
from graphopt.pipeline.plan import Refusal


@dataclass(frozen=True, eq=False)
class SparseSite:
    """One weight and the calls that read it.

    Attributes:
        weight_name: qualified name of the weight.
        calls: in graph order; all of them read it in the same layout.
    """

    weight_name: str
    calls: tuple[WeightedCall, ...]


def find_sites(gm: fx.GraphModule) -> tuple[list[SparseSite], list[Refusal]]:
    """List the weights of linear layers and convolutions, and the layers whose weight is none or not theirs alone."""
    by_weight: dict[int, list[WeightedCall]] = {}
    closed = regions_with_layers(gm)
    refusals = [Refusal(node.name, IN_A_REGION) for node in closed]
    layers, unweighted = Layers(gm), Unweighted(gm)
    for node in gm.graph.nodes:
        call = weighted_call(node, gm)
        if call is not None:
            by_weight.setdefault(id(constant(call.weight, gm)), []).append(call)
        elif is_layer(node):
            refusals.append(Refusal(node.name, unweighted.why(layer_call(node, gm))))
        elif node in layers and node not in closed:
            reason = unweighted.why_of_product(node) or "its weight is no stored matrix of a plain product"
            refusals.append(Refusal(node.name, reason))
    sites = []
    for calls in by_weight.values():
        name = calls[0].weight_name
        known = {call.node for call in calls}
        others = [user for user in uses(gm, name) if user not in known]
        kinds = {(call.kind, call.groups) for call in calls}
        if others or len(kinds) > 1:
            other = others[0] if others else calls[1].node
            refusals.append(Refusal(name, f"weight is shared with `{other.name}`", "weight is shared"))
        else:
            sites.append(SparseSite(name, tuple(calls)))
    return sites, refusals


def named(site: SparseSite, globs: Sequence[str]) -> bool:
    """Whether one of `globs` matches the weight's name."""
    return any(is_named(site.weight_name, glob) for glob in globs)


def with_weights(
    program: Program, tensors: Mapping[str, torch.Tensor], made_by: str, *, sparse: Collection[str]
) -> Program:
    """Return a program with other tensors, some of which are weights whose zeros later training is to keep.

    Raises:
        PassError: a plan was made for another program.
    """
    program = program.copy()
    gm = program.graph_module
    editor = Editor(gm, made_by)
    known = program.state_dict()
    for name in (*tensors, *sparse):
        if name not in known or (name in tensors and known[name].shape != tensors[name].shape):
            raise PassError(f"The plan holds weights for `{name}`, which this program has not. Make the plan again.")
    for name in sparse:
        for call in uses(gm, name):
            hold(call)
    for name, tensor in tensors.items():
        for alias in _names_of(gm, name):
            editor.put(alias, tensor, kind_of=tensor_attribute(gm, alias))
    return program.with_graph(editor.finish())


def _names_of(gm: fx.GraphModule, name: str) -> list[str]:
    """List every name under which the tensor called `name` is stored."""
    tensor = tensor_attribute(gm, name)
    names = [str(node.target) for node in gm.graph.nodes if constant(node, gm) is not None]
    return [known for known in dict.fromkeys(names) if tensor_attribute(gm, known) is tensor]
