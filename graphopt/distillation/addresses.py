"""Addresses of values inside a program: the module that ran an operator, and the operator.

    layer1.0.conv2:conv2d     the convolution of that module
    layer1.0.conv2            the value that leaves the module (a block's path works as well as a layer's)
    layer1.0:relu#1           the second of several `relu` calls made directly by that module
    layer?.?   *.attn:linear  shell globs over module paths and operators; `*` also crosses dots

Paths are those of `named_modules()` at capture and stay valid through passes, which keep provenance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import fx

from graphopt.errors import UsageError
from graphopt.ir.aliasing import Storages
from graphopt.ir.operators import short_name
from graphopt.ir.program import Program
from graphopt.ir.provenance import module_path
from graphopt.pipeline.plan import Refusal

_SHOWN = 6  # alternatives listed in a message


@dataclass(frozen=True, slots=True)
class Tap:
    """A value of a program: the address it is known by, and the node that computes it."""

    address: str  # canonical, "layer1.0.conv2:conv2d"
    node: str  # name of the node in the program's graph


def addresses(program: Program) -> dict[str, str]:
    """Return the node name of every operator call by its canonical address, in graph order.

    `#0`, `#1`, ... are added only where one module calls one operator several times.
    """
    groups: dict[str, list[str]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            groups.setdefault(f"{module_path(node)}:{short_name(node)}", []).append(node.name)
    named = {
        name: key if len(names) == 1 else f"{key}#{index}"
        for key, names in groups.items()
        for index, name in enumerate(names)
    }
    return {named[node.name]: node.name for node in program.graph.nodes if node.name in named}


def resolve(program: Program, wanted: Sequence[str]) -> tuple[list[Tap], list[Refusal]]:
    """Find the values that `wanted` addresses, each once, in graph order.

    Returns:
        The taps, and a refusal for every addressed call whose value cannot be a tap.

    Raises:
        UsageError: an address matches nothing (the nearest are suggested), or one without a glob matches several.
    """
    canonical = {node: address for address, node in addresses(program).items()}
    nodes = {node.name: node for node in program.graph.nodes}
    chosen: dict[str, str] = {}  # node name: the address as written
    for address in wanted:
        for name in _matches(program, canonical, address):
            chosen.setdefault(name, address)
    tappable = Tappable(program.graph)
    taps, refusals = [], []
    for name in (name for name in nodes if name in chosen):
        reason = tappable.why_not(nodes[name])
        if reason:
            refusals.append(Refusal(canonical[name], reason, reason.partition(":")[0]))
        else:
            taps.append(Tap(canonical[name], name))
    return taps, refusals


class Tappable:
    """Tells which values of a graph can be outputs."""

    def __init__(self, graph: fx.Graph) -> None:
        self._storages = Storages(graph)
        self._order = {node: index for index, node in enumerate(graph.nodes)}

    def why_not(self, node: fx.Node) -> str:
        """Return why the value of `node` cannot be an output, "" if it can."""
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool):
            return "it is a size, not a tensor"
        if not isinstance(value, torch.Tensor):
            return "it is several tensors: tap the `getitem` that takes one of them"
        later = [write for write in self._storages.writes(node) if self._order[write] > self._order[node]]
        return f"its memory is written to later: by `{later[0].name}`" if later else ""


def _matches(program: Program, canonical: Mapping[str, str], address: str) -> list[str]:
    """List the nodes that one address names."""
    module, colon, operator = address.partition(":")
    if colon:
        found = [name for name, known in canonical.items() if _fits(known, module, operator)]
    else:
        found = [name for path in _paths(program) if fnmatchcase(path, module) for name in _leaving(program, path)]
        found = list(dict.fromkeys(found))
    if not found:
        raise UsageError(f"Nothing in the program is at `{address}`. {_alternatives(program, canonical, address)}")
    if len(found) > 1 and not any(sign in address for sign in "*?["):
        listed = _listed([canonical[name] for name in found])
        raise UsageError(f"`{address}` names {len(found)} values. Say which: {listed}, or write a glob for all.")
    return found


def _fits(known: str, module: str, operator: str) -> bool:
    path, _, call = known.rpartition(":")
    return fnmatchcase(path, module) and (fnmatchcase(call, operator) or fnmatchcase(call.partition("#")[0], operator))


def _paths(program: Program) -> list[str]:
    """List the paths of all modules that ran a call, and of those around them, in graph order."""
    found: dict[str, None] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            parts = module_path(node).split(".")
            found.update(dict.fromkeys(".".join(parts[: end + 1]) for end in range(len(parts))))
    found.pop("", None)
    return list(found)


def _leaving(program: Program, path: str) -> list[str]:
    """List the calls inside the module `path` whose tensor is used outside it."""

    def inside(node: fx.Node) -> bool:
        own = module_path(node)
        return node.op == "call_function" and (own == path or own.startswith(f"{path}."))

    return [
        node.name
        for node in program.graph.nodes
        if inside(node) and isinstance(node.meta.get("val"), torch.Tensor) and not all(map(inside, node.users))
    ]


def _alternatives(program: Program, canonical: Mapping[str, str], address: str) -> str:
    known = list(canonical.values()) if ":" in address else _paths(program)
    close = get_close_matches(address, known, n=_SHOWN, cutoff=0.5) or known
    return f"Nearest: {_listed(close)}. `graphopt inspect` lists the modules."


def _listed(names: Iterable[str]) -> str:
    names = [f"`{name}`" for name in names]
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
