"""What depends on no input, and which of it is worth storing: `fold` stores it, others ask whether it would.

1. A value is constant if its operator is deterministic, its sizes are numbers and all its tensor inputs are constant;
   `new_zeros(x, ...)` and the like read no more of x than dtype and device.
2. Values that share memory are constant together: all writes to it must be constant, and nobody else may read it
   before the last write. A buffer that the graph writes to keeps its value between calls and is none.
3. What is kept of a constant region are the values that the rest of the graph reads. One that would take too many
   bytes (`growth`) is left alone, and what it is computed from is tried instead. What is looked up by stored bytes is
   left alone, whatever its size: it is stored so to be small.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping

import torch
from torch import fx

from graphopt.ir.aliasing import Storages, written_inputs
from graphopt.ir.graph import constant, tensor_attribute
from graphopt.ir.operators import FILLED_LIKE, UNINITIALISED, writes_in_place
from graphopt.ir.torch_internals import OpOverload
from graphopt.passes.layers.codes import is_lookup
from graphopt.passes.layers.growth import too_large
from graphopt.pipeline.plan import Refusal


def find_all_constants(gm: fx.GraphModule, storages: Storages) -> set[fx.Node]:
    """Return every node whose value depends on no input (cases 1 and 2 of the module's list)."""
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    barred: set[fx.Node] = set()
    while True:
        found: set[fx.Node] = set()
        for node in gm.graph.nodes:
            if node not in barred and (constant(node, gm) is not None or _is_constant_call(node, found)):
                found.add(node)
        spoiled = [node for node in gm.graph.nodes if node in found and _memory_changes(node, found, storages, order)]
        if not spoiled:
            return found
        barred.update(member for node in spoiled for member in storages.members(node))


def _is_constant_call(node: fx.Node, known: set[fx.Node]) -> bool:
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return node.args[0] in known
    if not isinstance(node.target, OpOverload) or node.target.namespace not in ("aten", "prims"):
        return False
    if node in UNINITIALISED or torch.Tag.nondeterministic_seeded in node.target.tags or not _is_static(node):
        return False
    inputs = node.all_input_nodes
    # the first input only tells dtype and device (and shape, which is a number where it matters)
    if node in FILLED_LIKE and not writes_in_place(node) and inputs and inputs[0] is node.args[0]:
        inputs = [source for source in inputs if source is not node.args[0] or source in _beyond_first(node)]
    return all(source in known for source in inputs)


def _beyond_first(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg((node.args[1:], node.kwargs), found.append)
    return found


def _is_static(node: fx.Node) -> bool:
    """Whether `node` has a tensor (or several) with sizes that are numbers."""
    value = node.meta.get("val")
    tensors = value if isinstance(value, list | tuple) else [value]
    return bool(tensors) and all(
        isinstance(t, torch.Tensor) and all(isinstance(size, int) for size in t.shape) for t in tensors
    )


def _memory_changes(node: fx.Node, known: set[fx.Node], storages: Storages, order: Mapping[fx.Node, int]) -> bool:
    """Whether someone outside `known` could see another value in the memory of `node` than its last one."""
    writes = storages.writes(node)
    if not writes:
        return False
    members = storages.members(node)
    if any(write not in known for write in writes) or any(m.op != "call_function" for m in members):
        return True
    last = order[writes[-1]]
    return any(user not in known and order[user] < last for member in members for user in member.users)


def worth_storing(
    gm: fx.GraphModule, constants: set[fx.Node], storages: Storages
) -> tuple[list[fx.Node], list[Refusal]]:
    """Choose the constants that the rest of the graph reads; walk back from those that are too large."""
    chosen: dict[fx.Node, None] = {}
    refusals: list[Refusal] = []
    outside = {user for node in gm.graph.nodes for user in node.users} - constants
    looked_up = _looked_up(gm, constants)
    for node in reversed(gm.graph.nodes):
        if node not in constants or node.op == "get_attr" or not outside.intersection(node.users):
            continue
        if node in looked_up:
            refusals.append(Refusal(node.name, "it is looked up by bytes, which are stored to be small"))
            continue
        if not isinstance(node.meta["val"], torch.Tensor) or written_inputs(node):
            outside.add(node)
            continue
        replaced = _replaced(gm, node, constants - outside)
        if replaced == 0 and any(member.op == "get_attr" for member in storages.members(node)):
            continue  # a view of an attribute that stays: storing it again would save nothing
        reason = too_large(_bytes(node.meta["val"]), replaced)
        if not reason:
            chosen[node] = None
            continue
        refusals.append(Refusal(node.name, f"it is constant, but {reason}", "a constant would be too large"))
        if not storages.writes(node):
            outside.add(node)
    ordered = [node for node in gm.graph.nodes if node in chosen]
    return ordered, refusals[::-1]


def _looked_up(gm: fx.GraphModule, constants: set[fx.Node]) -> set[fx.Node]:
    """Return the constants that are looked up by stored bytes, or computed from such."""
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node in constants and (is_lookup(node, gm) or not found.isdisjoint(node.all_input_nodes)):
            found.add(node)
    return found


def _replaced(gm: fx.GraphModule, node: fx.Node, constants: set[fx.Node]) -> int:
    """Return the bytes of the attributes that `node` is computed from and only `constants` read."""
    tensors = {
        source.target: _bytes(tensor_attribute(gm, str(source.target)))
        for source in sources([node])
        if all(user in constants for user in source.users)
    }
    return sum(tensors.values())


def sources(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """List the attribute reads that `nodes` are computed from."""
    return [node for node in ancestors(nodes) if node.op == "get_attr"]


def ancestors(nodes: Iterable[fx.Node]) -> dict[fx.Node, None]:
    """List what `nodes` are computed from, themselves included."""
    found: dict[fx.Node, None] = {}
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found[node] = None
            pending += node.all_input_nodes
    return found


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
