"""`graphopt cache`: what is kept of earlier runs, and clearing it."""

from __future__ import annotations

from typing import Annotated

import typer

from graphopt.errors import UsageError


def command(clear: Annotated[bool, typer.Option("--clear", help="Remove all of it.")] = False) -> None:
    """Show what passes decided in earlier runs, which `optimize` uses again, or clear it."""
    from graphopt.caching.store import MOST, PLACE, Store

    store = Store.of_user()
    if store is None:
        print(f"nothing is kept: the environment variable {PLACE} is empty, or names no folder that could be")
        return
    if reason := store.unusable():
        raise UsageError(reason)
    entries, size = store.usage()
    if clear:
        store.clear()
    done = " removed" if clear else f" of at most {MOST / 2**20:,.0f} MB"
    print(f"{store.folder}: {entries} entries, {size / 2**20:.1f} MB{done}")
    if entries and not clear:
        print(
            "`graphopt cache --clear` removes them; `optimize --no-cache` does without; "
            f"{PLACE} in the environment names another folder; empty, it keeps nothing"
        )
