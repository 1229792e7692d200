"""`graphopt passes`: which passes there are, and what one does and takes."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="List the passes, or show one.", invoke_without_command=True, rich_markup_mode=None)
Plugins = Annotated[list[Path] | None, typer.Option("--plugin", help="A Python file with passes of your own.")]


@app.callback()
def list_passes(context: typer.Context, plugin: Plugins = None) -> None:
    """List the passes, or show one."""
    if context.invoked_subcommand is not None:
        return
    from graphopt.cli.table import new_table, terminal
    from graphopt.pipeline.pass_base import Pass
    from graphopt.pipeline.registry import PassRegistry

    registry = PassRegistry(plugin or ())
    table = new_table()
    for column in ("pass", "", "what it does", "from"):
        table.add_column(column)
    for name, found in registry.working(Pass).items():
        kind = "lossy" if found.tolerance is None else f"exact to {found.tolerance:g}"
        table.add_row(name, kind, _first_line(found), registry.source(name))
    terminal().print(table)


@app.command("show")
def show(name: str, plugin: Plugins = None) -> None:
    """Show what a pass does, refuses and takes."""
    from graphopt.cli.table import new_table, terminal
    from graphopt.pipeline.options import describe
    from graphopt.pipeline.registry import PassRegistry

    registry = PassRegistry(plugin or ())
    found = registry.pass_class(name)
    console = terminal()
    console.print(f"{found.name}, from {registry.source(name)}", style="bold")
    console.print(_unwrapped(found))
    for word in ("needs", "produces", "invalidates", "after", "before", "conflicts"):
        if values := getattr(found, word):
            console.print(f"{word}: {', '.join(values)}")
    rows = describe(found.options_type)
    if not rows:
        console.print("It has no options.")
        return
    table = new_table()
    for column in ("option", "type", "default", "allowed"):
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(explained(found.options_type))


def explained(options_type: type) -> str:
    """Return the docstring of options, with the lines of those that it inherits and does not explain anew."""
    own = _unwrapped(options_type)
    lines = [line for kind in options_type.__mro__[1:-1] for line in _unwrapped(kind).splitlines()]
    known = {line.partition(": ")[0]: line for line in reversed(lines)}
    inherited = [item.name for item in dataclasses.fields(options_type) if f"\n{item.name}: " not in own]
    return "\n".join([own, *(known[name] for name in inherited if name in known)])


def _unwrapped(documented: type) -> str:
    """Return a docstring with one line for each paragraph, point and option, to be wrapped to the terminal's width."""
    return re.sub(r"(?<!\n)\n(?!\n|\d+\. |\w+: ) *", " ", inspect.getdoc(documented) or "")


def _first_line(found: type) -> str:
    return (inspect.getdoc(found) or "").partition("\n")[0]
