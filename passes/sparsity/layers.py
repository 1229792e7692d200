"""Layers that may take N:M sparse weights, and their weights as rows over the reduction axis.

The pattern runs along the input channels, for each output channel and each position of the kernel by itself: that is
where TensorRT looks for it (its documentation, "I/O formats and sparsity": of every 4 input channels 2 are zero).

    (groups, outputs, taps * inputs)            channels innermost
"""

from __future__ import annotations

import math

import torch
from torch import fx

from graphopt.ir.finite import all_finite
from graphopt.ir.graph import tensor_attribute
from graphopt.passes.layers.sparse_weights import SparseSite
from graphopt.passes.layers.weighted_call import (
    is_layer,
    weighted_call,
)
from graphopt.passes.layers.weights import as_rows
from graphopt.targets.description import SparseFormat


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


def has_pattern(rows: torch.Tensor, form: SparseFormat) -> bool:
    """Whether every group of `form.group` inputs holds at most `form.nonzeros` that are not zero."""
    grouped = rows.reshape(*rows.shape[:-1], -1, form.group)
    return bool(((grouped != 0).sum(-1) <= form.nonzeros).all())


def _computed(node: fx.Node) -> list[fx.Node]:
    """List what a node computes on that is not stored, sizes left out."""
    computed = (source for source in node.all_input_nodes if source.op != "get_attr")
    return [source for source in computed if not isinstance(source.meta.get("val"), int | torch.SymInt)]
