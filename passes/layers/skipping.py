"""What the option `skip` of several passes names."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import fx

from graphopt.ir.provenance import module_path

AS_ASKED = "left float as asked"


def why_skipped(node: fx.Node, skip: Sequence[str]) -> tuple[str, str] | None:
    """Return (reason, reason without particulars) where a pattern of `skip` names a node or its module."""
    path = module_path(node)
    pattern = next((p for p in skip if fnmatchcase(path, p) or fnmatchcase(node.name, p)), None)
    return None if pattern is None else as_asked(pattern)


def as_asked(pattern: str) -> tuple[str, str]:
    """Return (reason, reason without particulars) of what a pattern of `skip` names."""
    return f"left float as asked (skip={pattern})", AS_ASKED
