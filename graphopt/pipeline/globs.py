"""Globs that options take to name what a pass may or may not touch."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from graphopt.errors import UsageError

_LISTED = 5  # names that a message shows


def check_globs(
    option: str,
    globs: Iterable[str],
    names: Iterable[str],
    *,
    kind: str,
    others: Iterable[str] = (),
    matches: Callable[[str, str], bool] = fnmatchcase,
) -> None:
    """Check that every glob of an option names something; arguments and errors are those of `check_glob`."""
    names, others = list(names), list(others)
    for glob in globs:
        check_glob(f"{option}={glob}", glob, names, kind=kind, others=others, matches=matches)


def check_glob(
    written: str,
    glob: str,
    names: Iterable[str],
    *,
    kind: str,
    others: Iterable[str] = (),
    matches: Callable[[str, str], bool] = fnmatchcase,
) -> None:
    """Check that a glob names something.

    Args:
        written: the option as the user wrote it, `skip=layer9.*`.
        glob: the glob in it.
        names: what there is to name.
        kind: what the names are of, for the message: `weight`.
        others: what may be named too and is not worth listing, since the pass leaves it alone anyway.
        matches: tells whether a name, the first argument, is named by a glob.

    Raises:
        UsageError: the glob matches nothing.
    """
    listed = list(dict.fromkeys(names))
    if any(matches(name, glob) for name in (*listed, *others)):
        return
    near = difflib.get_close_matches(glob.strip("*"), listed, 1)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    shown = ", ".join(listed[:_LISTED]) + (", ..." if len(listed) > _LISTED else "")
    there = f"There are: {shown}." if listed else "There is none."
    raise UsageError(f"`{written}` matches no {kind} of this model.{hint} {there}")
