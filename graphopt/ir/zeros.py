"""Zeros that a pass has chosen: which calls say that training is to keep those of their weights.

Said of calls, in `meta["custom"]`, which survives files and re-export; what a pass makes in the place of one says it
too. Other zeros are numbers like any: a projection may start as nothing but zeros.
"""

from __future__ import annotations

import torch
from torch import fx

from graphopt.ir.provenance import custom_notes

_KEY = "graphopt_zeros"


def hold(node: fx.Node) -> None:
    """Say that the zeros of what a call multiplies with are to stay."""
    node.meta["custom"] = {**custom_notes(node), _KEY: "held"}


def holds(node: fx.Node) -> bool:
    """Whether a call says so."""
    return _KEY in custom_notes(node)


def held_zeros(gm: fx.GraphModule) -> dict[str, torch.Tensor]:
    """Return which numbers of parameters are no zeros that are to stay, 1 or 0, by name; of those with any."""
    parameters = dict(gm.named_parameters())
    found = {}
    for node in gm.graph.nodes:
        for name in _stored(node) if holds(node) else ():
            parameter = parameters.get(name)
            if parameter is not None and parameter.dim() > 1 and not bool(parameter.all()):
                found[name] = (parameter.detach() != 0).to(parameter.dtype)
    return found


def _stored(node: fx.Node) -> list[str]:
    """List the tensors that a call reads, directly or by calls on nothing but them."""
    waiting, names = list(node.all_input_nodes), []
    while waiting:
        source = waiting.pop()
        if source.op == "get_attr":
            names.append(str(source.target))
        elif source.op == "call_function" and _of_stored(source):
            waiting += source.all_input_nodes
    return names


def _of_stored(node: fx.Node) -> bool:
    return bool(node.all_input_nodes) and all(
        source.op == "get_attr" or (source.op == "call_function" and _of_stored(source))
        for source in node.all_input_nodes
    )
