"""What the option `skip` of several passes names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from graphopt.errors import UsageError
from graphopt.ir.program import Program
from graphopt.ir.provenance import module_path, origin
from graphopt.pipeline.context import Context
from graphopt.pipeline.globs import is_named

AS_ASKED = "left float as asked"


def why_skipped(node: fx.Node, skip: Sequence[str]) -> tuple[str, str] | None:
    """Return (reason, reason without particulars) where a pattern of `skip` names a node or its module."""
    path = module_path(node)
    pattern = next((p for p in skip if is_named(path, p) or is_named(node.name, p)), None)
    return None if pattern is None else as_asked(pattern)


def check_not_folded(skip: Sequence[str], program: Program, ctx: Context) -> None:
    """Check that no glob names only what the original has and the program, after passes before, has no more.

    Raises:
        UsageError: one does.
    """
    there = {name for node in program.graph.nodes for name in _names(node)}
    for glob in skip:
        if any(is_named(name, glob) for name in there):
            continue
        gone = [node for node in ctx.original.graph.nodes if any(is_named(name, glob) for name in _names(node))]
        gone.sort(key=lambda node: node.op == "get_attr")  # weights are named where no call is
        if gone:
            raise UsageError(
                f"`skip={glob}` names `{next(filter(None, _names(gone[0])))}`, {_why_gone(gone, program)}."
            )


def _names(node: fx.Node) -> tuple[str, ...]:
    if node.op == "get_attr":
        return (str(node.target),)
    return (module_path(node), node.name) if node.op == "call_function" else ()


def _why_gone(gone: Sequence[fx.Node], program: Program) -> str:
    """Say where nodes are now, by what the pass that folded them wrote down."""
    sites = {node.name for node in gone}
    for node in program.graph.nodes:
        known = origin(node)
        if known is not None and known.made_by == "fold" and known.site in sites and node.op == "call_function":
            layer = module_path(node) or node.name
            return f"which was folded into `{layer}`. Write `skip={layer}`, which leaves that as it is"
    return "which passes before this one folded away or removed: by its own name it cannot be skipped any more"


def as_asked(pattern: str) -> tuple[str, str]:
    """Return (reason, reason without particulars) of what a pattern of `skip` names."""
    return f"left float as asked (skip={pattern})", AS_ASKED
