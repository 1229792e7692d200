"""`graphopt presets`: which presets there are, and the file of one, to read and to copy."""

from __future__ import annotations

import typer

app = typer.Typer(help="List the presets, or print one.", invoke_without_command=True, rich_markup_mode=None)


@app.callback()
def list_presets(context: typer.Context) -> None:
    """List the presets, or print one."""
    if context.invoked_subcommand is not None:
        return
    from graphopt.cli.table import new_table, terminal
    from graphopt.pipeline.preset_files import preset_called, preset_names

    table = new_table()
    for column in ("preset", "of", "what it does"):
        table.add_column(column)
    for name in preset_names():
        found = preset_called(name)
        table.add_row(name, found.command, found.about)
    terminal().print(table)


@app.command("show")
def show(name: str) -> None:
    """Print the file of a preset: a copy of it is one of your own, --preset FILE.toml."""
    from graphopt.pipeline.preset_files import preset_file

    print(preset_file(name).read_text(), end="")
