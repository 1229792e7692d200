"""Embedding tables whose rows are scaled to a largest norm when they are read (`nn.Embedding(max_norm=...)`).

    embedding_renorm_(w, ids, n); embedding(w, ids)    ->    embedding(w', ids)        w': every row of w scaled so

The rows that a model has read stay scaled in it, and to scale them again changes nothing: what it computes is the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.graph import constant, erase_dead
from graphopt.ir.ownership import change_tensors, memory_key

aten = torch.ops.aten
_SCALES = aten.embedding_renorm_.default


def renorm_tables(gm: fx.GraphModule) -> None:
    """Store such tables scaled where all that is read of one is scaled alike, and scale nothing in the graph."""
    calls = gm.graph.find_nodes(op="call_function", target=_SCALES)
    tables = [table for node in calls if (table := constant(_behind(node), gm)) is not None]
    for own in dict.fromkeys(map(memory_key, tables)):
        reads = [user for node in _reads(gm, own) for user in node.users]
        scales = [user for node in reads if node.target is aten.detach.default for user in node.users]
        scales += [node for node in reads if node.target is _SCALES]
        norms = {node.args[2:] for node in scales}
        if len(norms) > 1 or not _are_scaled(reads, scales):
            continue
        norm = norms.pop()

        def scaled(tensor: Tensor, own: object = own, norm: tuple[Any, ...] = norm) -> Tensor:
            if memory_key(tensor) != own:
                return tensor
            return torch.embedding_renorm_(tensor.clone(), torch.arange(len(tensor), device=tensor.device), *norm)

        change_tensors([gm], scaled)
        for node in scales:
            gm.graph.erase_node(node)
    erase_dead(gm.graph)


def _behind(node: fx.Node) -> fx.Node:
    """Return what a node scales, or what that is a view of."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source.all_input_nodes[0] if source.target is aten.detach.default else source


def _reads(gm: fx.GraphModule, key: object) -> list[fx.Node]:
    """List what reads a place in memory."""
    held = ((node, constant(node, gm)) for node in gm.graph.find_nodes(op="get_attr"))
    return [node for node, tensor in held if tensor is not None and memory_key(tensor) == key]


def _are_scaled(reads: list[fx.Node], scales: list[fx.Node]) -> bool:
    """Whether embeddings alone read a table, each the rows that are scaled."""
    rows = {node.args[1] for node in scales}
    return all(
        node.args[1] in rows if node.target is aten.embedding.default else node.target in (aten.detach.default, _SCALES)
        for node in reads
    ) and not any(node.users for node in scales)
