"""Calls that turn a tensor in place become calls that return it turned: a value keeps its shape.

unsqueeze_(x, 0)       turned = unsqueeze(x, 0)
add(x, y)              add(turned, y)

Shapes that are checked before a stranger's program runs hold then while it runs.
"""

from __future__ import annotations

import torch
from torch import fx

from graphopt.errors import CaptureError
from graphopt.ir.aliasing import shared_inputs
from graphopt.ir.graph import arguments
from graphopt.ir.operators import RESHAPES, VIEWS, functional_twin, short_name, writes_in_place
from graphopt.ir.regions import every_graph_module
from graphopt.ir.torch_internals import OpOverload

_NEW = VIEWS | RESHAPES  # what they return is a tensor of its own, over the same memory


def return_what_is_turned(gm: fx.GraphModule) -> None:
    """Replace the calls, in place, in the bodies of regions too.

    Raises:
        CaptureError: what a call turns may be read later under the name of another value, which it would turn too.
    """
    for body in every_graph_module(gm):
        held = ("get_attr",) if body is gm else ("get_attr", "placeholder")  # what others see turned
        for node in list(body.graph.nodes):
            if isinstance(node.target, OpOverload) and torch.Tag.inplace_view in node.target.tags:
                _replace(node, held)
        body.recompile()


def _replace(node: fx.Node, held: tuple[str, ...]) -> None:
    given = arguments(node, ())
    twin, turned = functional_twin(node.target), given.get("self")
    if twin is None or not isinstance(turned, fx.Node):
        raise CaptureError(f"The model calls `{node.target}` with no tensor that is turned. Export it again.")
    order = {other: place for place, other in enumerate(node.graph.nodes)}
    written, others = _same_tensor(turned)
    node.target, node.args, node.kwargs = twin, tuple(given.values()), {}
    later = [user for value in others for user in value.users if order[user] > order[node]]
    if later or any(value.op in held for value in (*written, *others)):
        raise CaptureError(
            f"The model turns a value in place, by `{short_name(node)}_`, that it may read by another name, or in its "
            "next call. Let it use what the call returns (`x = x.unsqueeze(0)`), and export it again."
        )
    for value in written:
        for user in [user for user in value.users if order[user] > order[node]]:
            user.replace_input_with(value, node)


def _same_tensor(node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """List the values that are the tensor of `node`, by calls that write to it and return it; and those that may be."""
    written: dict[fx.Node, None] = {node: None}
    others: dict[fx.Node, None] = {}
    pending = [node]
    while pending:
        current = pending.pop()
        sources = [(source, current) for source in _handed_on(current)]
        results = [(user, user) for user in current.users if current in _handed_on(user)]
        for other, call in (*sources, *results):
            if other not in written and other not in others:
                (written if current in written and writes_in_place(call) else others)[other] = None
                pending.append(other)
    return list(written), list(others)


def _handed_on(node: fx.Node) -> list[fx.Node]:
    """List the inputs that a call may return as they are."""
    if not isinstance(node.target, OpOverload) or (node in _NEW and not writes_in_place(node)):
        return []
    return shared_inputs(node)
