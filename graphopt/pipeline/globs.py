"""Globs that options take to name what a pass may or may not touch."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from graphopt.errors import UsageError

_LISTED = 5  # names that a message shows


def is_named(name: str, glob: str) -> bool:
    """Whether a glob names something, or what it lies in: `layer3` names `layer3.0.conv1` and its weight."""
    return fnmatchcase(name, glob) or fnmatchcase(name, f"{glob}.*")


def check_globs(
    option: str,
    globs: Iterable[str],
    there: Iterable[str],
    *,
    kind: str,
    others: Iterable[str] = (),
    matches: Callable[[str, str], bool] = is_named,
) -> None:
    """Check that every glob of an option names something; arguments and errors are those of `check_glob`."""
    there, others = list(there), list(others)
    for glob in globs:
        check_glob(f"{option}={glob}", glob, there, kind=kind, others=others, matches=matches)


def check_glob(
    written: str,
    glob: str,
    there: Iterable[str],
    *,
    kind: str,
    others: Iterable[str] = (),
    matches: Callable[[str, str], bool] = is_named,
) -> None:
    """Check that a glob names something.

    Args:
        written: the option as the user wrote it, `skip=layer9.*`.
        glob: the glob in it.
        there: what there is to name.
        kind: what the names are of, for the message: `weight`.
        others: what may be named too and is not worth listing, since the pass leaves it alone anyway.
        matches: tells whether a name, the first argument, is named by a glob.

    Raises:
        UsageError: the glob matches nothing.
    """
    listed = list(dict.fromkeys(there))
    if any(matches(name, glob) for name in (*listed, *others)):
        return
    near = difflib.get_close_matches(glob.strip("*"), listed, 1)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    shown = ", ".join(listed[:_LISTED]) + (", ..." if len(listed) > _LISTED else "")
    there = f"There are: {shown}." if listed else "There is none."
    raise UsageError(f"`{written}` matches no {kind} of this model.{hint} {there}")
