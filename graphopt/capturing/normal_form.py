"""Bring a freshly captured graph to the form every analysis and pass relies on.

1. Arguments stand where the schema has them.
2. Regions that only switch gradients off (`torch.no_grad()` in a forward) are inlined: a program is one flat
   graph. Regions that change what is computed (`cond`, autocast that is on) stay, their bodies in normal form.
3. In-place operators become their functional twins (`relu_` -> `relu`) wherever nobody else sees the write.
   Those that others do see (a write through a view of a value used later, to an input, to a buffer) stay.
4. Products with a stored matrix turned around are Linear layers.
5. The memory of every tensor holds its values; tables whose rows are scaled when they are read hold them scaled.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from graphopt.capturing.argument_places import place_arguments
from graphopt.capturing.renormed_tables import renorm_tables
from graphopt.capturing.stored_products import restate_products
from graphopt.ir.aliasing import Storages, sharing_memory
from graphopt.ir.contents import resolved
from graphopt.ir.graph import assemble, erase_dead
from graphopt.ir.names import unused
from graphopt.ir.operators import functional_twin
from graphopt.ir.ownership import change_tensors
from graphopt.ir.regions import regions

_SET_GRAD = "wrap_with_set_grad_enabled"
_AUTOCAST = "wrap_with_autocast"


def normalise(gm: fx.GraphModule) -> fx.GraphModule:
    """Return `gm` in normal form. The graphs are changed in place, the module around the outer one is new."""
    place_arguments(gm)
    _normalise(gm, inside=False, cast=False)
    renorm_tables(gm)
    result = assemble(gm, gm.graph)
    change_tensors([result], resolved)
    return result


def _normalise(gm: fx.GraphModule, *, inside: bool, cast: bool) -> None:
    """Change a graph and the bodies of its regions.

    Args:
        gm: the program or the body of a region.
        inside: it is a body.
        cast: it runs under autocast, where a region that switches autocast off changes what is computed.
    """
    while _inline_regions(gm, cast):
        pass
    _make_functional(gm.graph, inside=inside)
    _drop_identities(gm.graph, inside=inside)
    restate_products(gm.graph)
    erase_dead(gm.graph)
    gm.graph.lint()
    gm.recompile()
    for found in regions(gm):
        for body in found.bodies:
            _normalise(body, inside=True, cast=cast or found.form == "block")


def _drop_identities(graph: fx.Graph, *, inside: bool) -> None:
    """Erase what only exists so that a Python constant is not written to."""
    storages = Storages(graph)
    for node in list(graph.nodes):
        # Without the copy every call would write to the constant again, and torch 2.13, which traces the bodies of a
        # region anew where gradients are on, takes no constant but through it.
        if node.target is torch.ops.aten.lift_fresh_copy.default and (inside or storages.writes(node)):
            continue
        if node.target in (torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.detach_.default):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _inline_regions(gm: fx.GraphModule, cast: bool) -> bool:
    found = False
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        name = getattr(node.target, "__name__", "")
        if name == _SET_GRAD:
            body, operands = node.args[1], node.args[2:]
        elif name == _AUTOCAST and node.args[2] is False and not cast:
            # device, dtype, enabled, cache_enabled, body, *operands
            body, operands = node.args[4], node.args[5:]
        else:
            continue
        _inline(gm, node, getattr(gm, body.target), operands)
        found = True
    return found


def _inline(gm: fx.GraphModule, call: fx.Node, body: fx.GraphModule, operands: Iterable[Any]) -> None:
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    values: dict[fx.Node, Any] = dict(zip(placeholders, operands, strict=True))
    with gm.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                results = fx.map_arg(node.args[0], values.__getitem__)
                break
            values[node] = gm.graph.node_copy(node, values.__getitem__)
            values[node].meta = dict(node.meta)
            if node.op == "get_attr":
                values[node].target = _adopt(gm, body, str(node.target))
    if isinstance(results, tuple | list):
        for user in list(call.users):  # getitem(call, i)
            user.replace_all_uses_with(results[_index(user)])
            gm.graph.erase_node(user)
    else:
        call.replace_all_uses_with(results)
    gm.graph.erase_node(call)


def _adopt(gm: fx.GraphModule, body: fx.GraphModule, name: str) -> str:
    """Give `gm` what `body` holds under a name; return its name there, where another may have the same."""
    held = getattr(body, name)
    own = unused(name, lambda other: getattr(gm, other, held) is not held)
    setattr(gm, own, held)
    return own


def _index(getitem: fx.Node) -> int:
    index = getitem.args[1]
    assert isinstance(index, int)  # a region returns a tuple
    return index


def _make_functional(graph: fx.Graph, *, inside: bool) -> None:
    """Replace in-place operators; what is written to an input of a body (`inside`) is seen outside it."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        twin = functional_twin(node.target)
        if twin is None or not isinstance(node.args[0], fx.Node):
            continue
        written = node.args[0]
        if _seen_by_others(node, written, order, inside):
            continue
        value = written.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dtype != node.meta["val"].dtype:
            continue
        node.target = twin
        for user in list(written.users):
            if order[user] > order[node]:
                user.replace_input_with(written, node)


def _seen_by_others(write: fx.Node, written: fx.Node, order: dict[fx.Node, int], inside: bool) -> bool:
    """Whether anyone but the users of `written` and of `write` itself can see the write.

    A view taken after the write is a later use of what it was taken from, so only earlier values count.
    """
    later = order[write]
    members = sharing_memory(written)
    if any(member.op == "get_attr" for member in members):  # a buffer keeps the value between calls
        return True
    if inside and any(member.op == "placeholder" for member in members):
        return True
    return any(
        order[user] > later
        for member in members
        if member is not written and order[member] < later
        for user in member.users
    )
