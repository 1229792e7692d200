"""Embedding tables whose rows are scaled to a largest norm when they are read (`nn.Embedding(max_norm=...)`).

    embedding_renorm_(w, ids, n); embedding(w, ids)    ->    embedding(w', ids)        w': every row of w scaled so

The rows that a model has read stay scaled in it, and to scale them again changes nothing: what it computes is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from graphopt.ir.graph import constant, erase_dead
from graphopt.ir.ownership import change_tensors, memory_key

aten = torch.ops.aten
_SCALES = aten.embedding_renorm_.default


def renorm_tables(gm: fx.GraphModule) -> None:
    """Store such tables scaled, where embeddings alone read them, and scale nothing in the graph."""
    for node in gm.graph.find_nodes(op="call_function", target=_SCALES):
        table = constant(_behind(node), gm)
        if table is None or node.users or not _read_by_rows(gm, memory_key(table)):
            continue
        own, norm = memory_key(table), node.args[2:]

        def scaled(tensor: Tensor, own: object = own, norm: tuple[float, ...] = norm) -> Tensor:
            if memory_key(tensor) != own:
                return tensor
            return torch.embedding_renorm_(tensor.clone(), torch.arange(len(tensor), device=tensor.device), *norm)

        change_tensors([gm], scaled)
        gm.graph.erase_node(node)
    erase_dead(gm.graph)


def _behind(node: fx.Node) -> fx.Node:
    """Return what a node scales, or what that is a view of."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source.all_input_nodes[0] if source.target is aten.detach.default else source


def _read_by_rows(gm: fx.GraphModule, key: object) -> bool:
    """Whether embeddings alone read what is stored in a place, and what scales it."""
    reads = [
        node
        for node in gm.graph.find_nodes(op="get_attr")
        if (held := constant(node, gm)) is not None and memory_key(held) == key
    ]
    users = [user for node in reads for user in node.users]
    users += [user for node in users if node.target is aten.detach.default for user in node.users]
    return all(user.target in (aten.embedding.default, aten.detach.default, _SCALES) for user in users)
