"""The report as tables on a terminal."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection
from typing import IO

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from graphopt.job.report import Latency, Report, Row

_COLUMNS = ("step", "parameters", "FLOPs", "bytes on disk", "latency (quartiles)", "speed-up", "error", "")
_BRIEF_COLUMNS = ("step", "params", "FLOPs", "bytes", "latency", "speed-up", "error", "")
_WORTH = (1, 2, 3, 5, 6, 4)  # places of columns, those first whose parentheses say most
_SPEEDUP = _COLUMNS.index("speed-up")
_PARENTHESES = re.compile(r" \([^)]*\)")
_NARROWEST_STEP, _WIDEST_STEP = 12, 24
_UNBOUNDED = 1000


def terminal(*, width: int | None = None, file: IO[str] | None = None) -> Console:
    """Return a console that prints text as it is: names and notes hold what rich would take for markup and emoji."""
    return Console(width=width, file=file, markup=False, emoji=False, highlight=False)


def print_report(report: Report, console: Console) -> None:
    """Print the before/after table, the sites left alone, notes, and the files written."""
    unbounded = console.options.update(width=_UNBOUNDED)
    brief: frozenset[int] | None = None

    def fits(brief: frozenset[int] | None) -> bool:
        return console.measure(before_after(report, brief=brief), options=unbounded).maximum <= console.width

    if not fits(None):
        brief = frozenset(_WORTH)
        for place in _WORTH:
            if fits(brief - {place}):
                brief -= {place}
    console.print(before_after(report, brief=brief), crop=False)
    if report.refusals:
        console.print(left_alone(report))
    for note in dict.fromkeys(report.notes):
        console.print(f"note: {note}", soft_wrap=True)


def before_after(report: Report, *, brief: Collection[int] | None = None) -> Table:
    """Build the table: a row for the original, each pass, and each artifact; columns that someone has an entry in.

    Args:
        report: what is shown.
        brief: for a narrow terminal: places of columns that leave out what stands in parentheses.
    """
    others = list(report.baselines.values())[1:]  # the first is in the first row
    rows = [report.original, *others, *report.rows[1:]]
    cells = [_cells(row, report) for row in rows]
    table = new_table(f"{report.model}: {report.pipeline}")
    shown = [0, *(place for place in range(1, len(_COLUMNS)) if any(row[place] for row in cells))]
    if brief is not None:
        table.collapse_padding, table.pad_edge = True, False
        for entries, place in itertools.product(cells, brief):
            entries[place] = _PARENTHESES.sub("", entries[place])
    table.add_column("step", overflow="fold", min_width=_NARROWEST_STEP, max_width=_WIDEST_STEP)  # it gives way
    for place in shown[1:]:
        name = (_BRIEF_COLUMNS if place in (brief or ()) else _COLUMNS)[place]
        widest = max(cell_len(row[place]) for row in cells)
        title = name or report.metric or "agreement"
        table.add_column(title, justify="right", overflow="fold", no_wrap=bool(name), min_width=widest)
    for row, entries in zip(rows, cells, strict=True):
        artifact = row.size is not None and row.label != report.original.label
        last = row is [report.original, *others][-1] or row is rows[-1]
        table.add_row(*(entries[place] for place in shown), end_section=last, style="bold" if artifact else "")
    latency = next((row.latency for row in reversed(rows) if row.latency is not None), None)
    if latency is not None:
        spreads = [row.latency.speedup_spread for row in rows if row.latency and row.latency.speedup_spread]
        table.caption = (
            f"latency (wall-clock), speed-up (processor time): {latency.session}, batch {latency.batch}, "
            f"median of {'paired ' if spreads else ''}calls"
        )
        if _SPEEDUP in (brief or ()) and spreads:
            quartiles = ", ".join(f"{low:.2f}-{high:.2f}" for low, high in spreads)
            table.caption += f"; quartiles of the speed-up {quartiles}"
        table.caption_justify = "left"
    return table


def new_table(title: str = "") -> Table:
    """Return an empty table in the one look that all of graphopt's have."""
    return Table(
        title=title or None, title_justify="left", title_style="bold", header_style="bold", box=box.SIMPLE_HEAD
    )


def left_alone(report: Report) -> Table:
    """Build the table of refusals, counted by reason."""
    table = new_table("left alone")
    table.add_column("pass")
    table.add_column("sites", justify="right")
    table.add_column("reason", overflow="fold")
    table.add_column("for example", overflow="fold")
    for name, reason, count, first in report.refusal_counts():
        table.add_row(name, str(count), reason, first)
    return table


def _cells(row: Row, report: Report) -> list[str]:
    before = report.original
    artifact = row.size is not None and row.label != before.label
    target = row.target or (next(iter(report.baselines)) if row is before and len(report.baselines) > 1 else "")
    label = f"{row.label} for {target}" if target and not artifact else row.label
    parameters = _ratio(row.cost.parameters, before.cost.parameters) if row.cost and before.cost else ""
    flops = _ratio(row.cost.flops, before.cost.flops) if row.cost and before.cost else ""
    return [
        label,
        parameters,
        flops,
        _size(row, report),
        _latency(row.latency),
        (row.latency and row.latency.speedup_text) or "",
        _error(row),
        _metric(row, report),
    ]


def _ratio(value: int, before: int) -> str:
    share = value / before if before else 1.0
    return count(value) if 0.995 < share < 1.005 else f"{count(value)} ({share:.0%})"


def _size(row: Row, report: Report) -> str:
    """Bytes on disk where there is a file; otherwise nothing: a program in memory is not a file."""
    if row.size is None:
        return ""
    before = report.baseline(row).size
    text = f"{count(row.size)}B"
    if row.label == report.original.label or not before:
        return text
    return f"{text} ({before / row.size:.1f}x smaller)" if row.size < before else f"{text} ({row.size / before:.2f}x)"


def _latency(latency: Latency | None) -> str:
    if latency is None:
        return ""
    low, high = latency.spread
    return f"{latency.milliseconds:.3g} ms ({low:.3g}-{high:.3g})"


def _error(row: Row) -> str:
    if row.error is None:
        return ""
    sqnr = "" if math.isinf(row.error.sqnr) else f" ({row.error.sqnr:.0f} dB)"
    return f"{row.error.relative:.1e}{sqnr}"


def _metric(row: Row, report: Report) -> str:
    if report.metric:
        return "" if row.metric is None else f"{row.metric:.2f}"
    if row.error is None or row.error.agreement is None:
        return ""
    return f"{row.error.agreement:.1%}"


def count(value: float) -> str:
    """Write a count with a decimal prefix: 11.7M."""
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{prefix}"
    return f"{value:.3g}"
