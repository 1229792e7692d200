"""Which integers a stored weight may take: its type holds more, and a weight need not use all of them.

Said of the call that reads it, in `meta["custom"]`, which survives files and re-export; a file may hold anything there.
"""

from __future__ import annotations

import re

from torch import fx

from graphopt.ir.provenance import custom_notes

_KEY = "graphopt_range"
_WRITTEN = re.compile(r"(-?\d{1,3})\.\.(-?\d{1,3})")


def record_range(node: fx.Node, low: int, high: int) -> None:
    """Say that what a call reads may be any integer from `low` to `high`."""
    node.meta["custom"] = {**custom_notes(node), _KEY: f"{low}..{high}"}


def recorded_range(node: fx.Node) -> tuple[int, int] | None:
    """Return what was said of a call, None where nothing was."""
    found = _WRITTEN.fullmatch(str(custom_notes(node).get(_KEY)))
    return None if found is None else (int(found[1]), int(found[2]))
