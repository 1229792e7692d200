"""Layers that may take N:M sparse weights, and their weights as rows over the reduction axis.

The pattern runs along the input channels, for each output channel and each position of the kernel by itself: that is
where TensorRT looks for it (its documentation, "I/O formats and sparsity": of every 4 input channels 2 are zero).

    (groups, outputs, taps * inputs)            channels innermost
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from graphopt.ir.finite import all_finite
from graphopt.ir.graph import constant, tensor_attribute
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
from graphopt.passes.layers.weights import as_rows
from graphopt.pipeline.plan import Refusal
from graphopt.targets.description import SparseFormat


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


def why_not(site: SparseSite, form: SparseFormat, gm: fx.GraphModule) -> tuple[str, str] | None:
    """Return why no sparse kernel takes a layer and what that is counted as, None if one does."""
    call, weight = site.calls[0], tensor_attribute(gm, site.weight_name)
    if call.kind == "transposed conv":
        return "a transposed convolution has no sparse kernel", ""
    if not weight.numel():
        return "its weight has no elements", ""
    inputs, outputs = call.in_features // call.groups, call.out_features
    if call.groups > 1 and inputs == 1:
        return "depthwise: one input channel for each output", ""
    if inputs % form.inputs_multiple or inputs % form.group:
        wanted = math.lcm(form.inputs_multiple, form.group)
        return f"{inputs} inputs are no multiple of {wanted}", "inputs not aligned"
    if outputs % form.outputs_multiple:
        return f"{outputs} outputs are no multiple of {form.outputs_multiple}", "outputs not aligned"
    if not all_finite(weight):
        return "its weight holds NaN or infinite values", ""
    if has_pattern(as_rows(call, weight), form):
        return "it has the pattern already", ""
    return None


def at_the_ends(gm: fx.GraphModule) -> set[fx.Node]:
    """Return the layers that read an input of the program or make an output, through calls with one operand."""
    layers = {node for node in gm.graph.nodes if is_layer(node) or weighted_call(node, gm) is not None}
    found: set[fx.Node] = set()
    ahead = {node for node in gm.graph.nodes if node.op == "placeholder"}
    for node in gm.graph.nodes:
        computed = _computed(node)
        if len(computed) == 1 and computed[0] in ahead:
            (found if node in layers else ahead).add(node)
    behind = list(next(node for node in gm.graph.nodes if node.op == "output").all_input_nodes)
    while behind:
        node = behind.pop()
        if node in layers:
            found.add(node)
        elif len(_computed(node)) == 1:
            behind += _computed(node)
    return found


def named(site: SparseSite, globs: Sequence[str]) -> bool:
    """Whether one of `globs` matches the weight's name."""
    return any(fnmatch.fnmatchcase(site.weight_name, glob) for glob in globs)


def has_pattern(rows: torch.Tensor, form: SparseFormat) -> bool:
    """Whether every group of `form.group` inputs holds at most `form.nonzeros` that are not zero."""
    grouped = rows.reshape(*rows.shape[:-1], -1, form.group)
    return bool(((grouped != 0).sum(-1) <= form.nonzeros).all())


def _computed(node: fx.Node) -> list[fx.Node]:
    """List what a node computes on that is not stored, sizes left out."""
    computed = (source for source in node.all_input_nodes if source.op != "get_attr")
    return [source for source in computed if not isinstance(source.meta.get("val"), int | torch.SymInt)]
