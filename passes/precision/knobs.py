"""What `half` does to each weight of a program by itself: how what reads it computes, and the bytes it saves."""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set

import networkx as nx
import torch
from torch import Tensor, fx

from graphopt.ir.graph import constant, tensor_attribute
from graphopt.ir.program import Program
from graphopt.pipeline.knobs import Alternative, Knob, on_changed


def knobs_of(program: Program, weights: Sequence[str], computed: Collection[str], dtype: torch.dtype) -> list[Knob]:
    """List the weights that are stored in 16 bits, in graph order; those that one call reads are one site.

    Args:
        program: what they are of.
        weights: their names, each under all it has.
        computed: calls that compute in 16 bits; the others get float32 back.
        dtype: the type of 16 bits.
    """
    gm = program.graph_module
    stored = {node for node in gm.graph.find_nodes(op="get_attr") if node.target in weights}
    together: nx.Graph[object] = nx.Graph()  # weights with the calls that read them, under any of their names
    for read in stored:
        nx.add_star(together, [id(constant(read, gm)), *read.users])
    knobs = []
    for part in nx.connected_components(together):
        reads = [node for node in gm.graph.nodes if node in stored and id(constant(node, gm)) in part]
        calls = [node for node in gm.graph.nodes if node in part]
        alternatives = {call: _reading(call, stored, call.name in computed, dtype) for call in calls}
        tensors = {id(tensor): tensor for tensor in (tensor_attribute(gm, str(read.target)) for read in reads)}
        saved = 2.0 * sum(tensor.numel() for tensor in tensors.values())
        knobs.append(Knob(str(reads[0].target), tuple(call.name for call in calls), alternatives, {"bytes": saved}))
    return knobs


def _reading(call: fx.Node, stored: Set[fx.Node], computes: bool, dtype: torch.dtype) -> Alternative:
    """Return a call that reads weights of 16 bits, and if it computes in them reads and gives nothing finer."""
    read = [value for value in call.all_input_nodes if computes or value in stored]
    inner = on_changed(call, dict.fromkeys(read, lambda value: _rounded(value, dtype)))
    return Alternative(lambda args, kwargs: _rounded(inner.run(args, kwargs), dtype)) if computes else inner


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype).to(value.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
