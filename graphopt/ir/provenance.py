"""Where each node came from: the captured node it descends from, and the pass and site that made it.

Kept under one key of `node.meta["custom"]`, the only metadata that survives both re-export and `.pt2`
(measured on torch 2.13). Values are strings, so that they serialise as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from torch import fx

from graphopt.ir.operators import short_name
from graphopt.ir.regions import every_graph_module

_KEY = "graphopt"
_EXPORTED_AGAIN = re.compile("^(L__self__)+")  # what keys of a module stack start with: one more for each export
_FRAMES = re.compile(r'^(?=\s*File ")', re.MULTILINE)
_GENERATED = 'File "<eval_with_key>'  # code of a graph, numbered by how many the process has made


@dataclass(frozen=True, slots=True)
class Origin:
    """What a node descends from."""

    node: str  # name of the captured node
    module: str  # path of the module whose forward ran it, "" for the model itself
    op: str  # captured operator, "conv2d"; "" for inputs and parameters
    made_by: str = ""  # pass that created the node, "" when capture did
    site: str = ""  # the plan's name for the rewrite that created it


_KNOWN = {item.name for item in fields(Origin)}
_REQUIRED = {item.name for item in fields(Origin) if item.default is MISSING}


def custom_notes(node: fx.Node) -> dict[str, Any]:
    """Return what is kept under "custom", a copy: nothing where a stranger's file or pass left what is no object."""
    found = node.meta.get("custom")
    return {key: value for key, value in found.items() if isinstance(key, str)} if isinstance(found, Mapping) else {}


def origin(node: fx.Node) -> Origin | None:
    """Return the origin of `node`, or None if nothing recorded one in the form that `record` writes."""
    stored = custom_notes(node).get(_KEY)
    if not isinstance(stored, Mapping) or not _KNOWN >= stored.keys() >= _REQUIRED:
        return None
    return Origin(**stored) if all(isinstance(value, str) for value in stored.values()) else None


def record(node: fx.Node, value: Origin) -> None:
    """Write `value` on `node`, leaving other owners of the metadata key alone."""
    stored = {
        "node": value.node,
        "module": value.module,
        "op": value.op,
        "made_by": value.made_by,
        "site": value.site,
    }
    node.meta["custom"] = {**custom_notes(node), _KEY: stored}


def record_capture(gm: fx.GraphModule) -> None:
    """Give every freshly captured node its own origin; nodes that already carry one keep it."""
    drop_process_traces(gm)
    for node in gm.graph.nodes:
        if node.op == "output" or origin(node) is not None:
            continue
        record(node, Origin(node.name, module_path(node), short_name(node)))


def drop_process_traces(gm: fx.GraphModule) -> None:
    """Remove what torch's exporter notes about this run of it: the same program must give the same bytes."""
    for node in (node for module in every_graph_module(gm) for node in module.graph.nodes):
        node.meta.pop("from_node", None)  # holds addresses
        if trace := node.meta.pop("stack_trace", None):
            written = "".join(frame for frame in _FRAMES.split(trace) if not frame.lstrip().startswith(_GENERATED))
            node.meta.update({"stack_trace": written} if written else {})
        if "nn_module_stack" in node.meta:
            stack = node.meta["nn_module_stack"].items()
            node.meta["nn_module_stack"] = {_EXPORTED_AGAIN.sub(r"\1", key): module for key, module in stack}
        if node.meta.get("custom"):
            notes = custom_notes(node)
            node.meta["custom"] = {key: note for key, note in notes.items() if not key.startswith("_torchdynamo")}


def module_path(node: fx.Node) -> str:
    """Return the path of the innermost module that ran `node`, as in `named_modules()`."""
    known = origin(node)
    if known is not None:
        return known.module
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return path.removeprefix("L['self'].").removeprefix("L['self']")


def user_line(node: fx.Node) -> str:
    """Return the innermost line of the user's model behind `node`, `file:line`, or "" if unknown."""
    return line_in(node.meta.get("stack_trace") or "")


def at_line(node: fx.Node) -> str:
    """Return the same for the middle of a sentence: " at file:line"."""
    line = user_line(node)
    return f" at {line}" if line else ""


def line_in(stack_trace: str) -> str:
    """Return the innermost line of the user's model in a stack trace, `file:line`, or "" if there is none."""
    frames = [line.strip() for line in stack_trace.splitlines()]
    files = [line for line in frames if line.startswith("File ")]
    foreign = [line for line in files if "/torch/" not in line] or files
    if not foreign:
        return ""
    path, _, rest = foreign[-1].removeprefix('File "').partition('", line ')
    return f"{path}:{rest.split(',')[0]}"
