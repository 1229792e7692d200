"""Which values of a graph may share memory, and who writes to them.

Memory is followed through views, in-place results and composite operators that may return either. The answer
errs on the side of sharing: two values in one group may still be separate tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.ir.operators import SILENT_VIEWS
from graphopt.ir.regions import inputs, region
from graphopt.ir.torch_internals import OpOverload, pytree


def shared_inputs(node: fx.Node) -> list[fx.Node]:
    """List the inputs whose memory the result of `node` may share."""
    if node.op != "call_function":
        return []
    if getattr(node.target, "__name__", "") == "getitem":
        return node.all_input_nodes[:1]
    if not isinstance(node.target, OpOverload):
        return node.all_input_nodes  # a higher-order region may hand its operands through
    found: list[fx.Node] = []
    for argument, value in _bound(node):
        if argument.alias_info is not None or node in SILENT_VIEWS:
            found += [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, fx.Node) and not _is_number(leaf)]
    return found


def written_inputs(node: fx.Node) -> list[fx.Node]:
    """List the inputs that `node` writes to; of a region those that its bodies write to."""
    if node.op != "call_function":
        return []
    if not isinstance(node.target, OpOverload):
        return _written_inside(node)
    return [
        leaf
        for argument, value in _bound(node)
        if argument.alias_info is not None and argument.alias_info.is_write
        for leaf in pytree.tree_leaves(value)
        if isinstance(leaf, fx.Node)
    ]


def _written_inside(node: fx.Node) -> list[fx.Node]:
    owner = node.graph.owning_module
    found = region(node, owner) if owner is not None else None
    if found is None:
        return []
    written: dict[fx.Node, None] = {}
    for body in found.bodies:
        storages = Storages(body.graph)
        for value, operand in zip(inputs(body), found.operands, strict=True):
            if isinstance(operand, fx.Node) and storages.writes(value):
                written[operand] = None
    return list(written)


def sharing_memory(node: fx.Node) -> list[fx.Node]:
    """List the values that may share memory with `node`, itself included, as the graph is now.

    For graphs that are being rewritten; `Storages` answers for all nodes of a graph at once.
    """
    found = {node: None}
    pending = [node]
    while pending:
        current = pending.pop()
        views = [user for user in current.users if current in shared_inputs(user)]
        for other in (*shared_inputs(current), *views):
            if other not in found:
                found[other] = None
                pending.append(other)
    return list(found)


class Storages:
    """The values of one graph, grouped by the memory they may share."""

    def __init__(self, graph: fx.Graph) -> None:
        self._parent: dict[fx.Node, fx.Node] = {node: node for node in graph.nodes}
        for node in graph.nodes:
            for source in shared_inputs(node):
                self._join(source, node)
        self._members: dict[fx.Node, list[fx.Node]] = {}
        self._writes: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            self._members.setdefault(self.owner(node), []).append(node)
            for written in written_inputs(node):
                self._writes.setdefault(self.owner(written), []).append(node)

    def owner(self, node: fx.Node) -> fx.Node:
        """Return the node that stands for the group of `node`."""
        while self._parent[node] is not node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node

    def members(self, node: fx.Node) -> list[fx.Node]:
        """List the values that may share memory with `node`, itself included, in graph order."""
        return self._members[self.owner(node)]

    def writes(self, node: fx.Node) -> list[fx.Node]:
        """List the calls that write to the memory of `node`, in graph order."""
        return self._writes.get(self.owner(node), [])

    def _join(self, one: fx.Node, other: fx.Node) -> None:
        self._parent[self.owner(other)] = self.owner(one)


def _bound(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    """Pair the schema's arguments with the values of a call."""
    schema = node.target._schema  # type: ignore[union-attr]
    for position, argument in enumerate(schema.arguments):
        if position < len(node.args):
            yield argument, node.args[position]
        elif argument.name in node.kwargs:
            yield argument, node.kwargs[argument.name]


def _is_number(node: fx.Node) -> bool:
    """Whether a value is no tensor and holds none: a size that `reshape` reads shares no memory."""
    return isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat)
