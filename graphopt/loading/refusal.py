"""The one sentence that every refused file ends with: the two ways forward."""

from __future__ import annotations

from pathlib import Path

from graphopt.errors import LoadError, cut, printable

_LONGEST = 500  # characters

WAYS_FORWARD = (
    "Either build the model from your own code with `--factory package.module:function` and take only the "
    "weights from a `.safetensors` or weights-only `.pt` file, or, if you trust whoever made the file, pass "
    "`--trust` (it can run any code on this machine)."
)


def untrusted(source: str | Path, reason: str) -> LoadError:
    """Return the error for a file that could run code: what was found, and the two ways forward."""
    return LoadError(f"Refused to load `{source}`: {reason}. Nothing in the file was run. {WAYS_FORWARD}")


class _FoundError(Exception):
    """A reason that quotes a stranger's names, of any length: it is cut, and holds nothing that a terminal obeys."""

    def __init__(self, reason: str) -> None:
        super().__init__(cut(printable(reason), _LONGEST))


class HostileError(_FoundError):
    """Something in a file that a check does not allow; carries the reason, not yet the file's name."""


class DamagedError(_FoundError):
    """A file that is not what its layout promises; carries the reason, not yet the file's name."""
