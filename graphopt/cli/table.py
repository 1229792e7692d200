"""The report as tables on a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from graphopt.report import Latency, Report, Row


def print_report(report: Report, console: Console) -> None:
    """Print the before/after table, the sites left alone, notes, and the files written."""
    console.print(before_after(report))
    if report.refusals:
        console.print(left_alone(report))
    for note in dict.fromkeys(report.notes):
        console.print(f"note: {note}", highlight=False, soft_wrap=True)


def before_after(report: Report) -> Table:
    """Build the table: a row for the original, each pass, and each artifact."""
    table = Table(title=f"{report.model}: {report.pipeline}", title_justify="left", header_style="bold", pad_edge=False)
    table.add_column("step", overflow="fold", min_width=12)
    columns = ["parameters", "FLOPs", "bytes", "latency", "speed-up", "error", report.metric or "agreement"]
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.rows:
        last_of_section = row is report.rows[0] or row.size is not None
        table.add_row(*_cells(row, report), end_section=last_of_section, style="bold" if row.size is not None else "")
    return table


def left_alone(report: Report) -> Table:
    """Build the table of refusals, counted by reason."""
    table = Table(title="left alone", title_justify="left", header_style="bold", pad_edge=False)
    table.add_column("pass")
    table.add_column("sites", justify="right")
    table.add_column("reason", overflow="fold")
    table.add_column("for example", overflow="fold")
    for name, reason, count, first in report.refusal_counts():
        table.add_row(name, str(count), reason, first)
    return table


def _cells(row: Row, report: Report) -> Sequence[str]:
    before = report.original
    label = row.label if row.size is not None or not row.target else f"{row.label} [{row.target}]".replace("[", r"\[")
    parameters = _ratio(row.cost.parameters, before.cost.parameters) if row.cost and before.cost else ""
    flops = _ratio(row.cost.flops, before.cost.flops) if row.cost and before.cost else ""
    metric = _metric(row, report)
    speedup = ""
    if row.latency is not None and row.latency.speedup is not None:
        speedup = f"{row.latency.speedup:.2f}x"
        if row.latency.speedup_spread is not None:
            low, high = row.latency.speedup_spread
            speedup += f" ({low:.2f}-{high:.2f})"
    return (label, parameters, flops, _size(row, report), _latency(row.latency), speedup, _error(row), metric)


def _ratio(value: int, before: int) -> str:
    text = count(value)
    return text if value == before or not before else f"{text} ({value / before:.0%})"


def _size(row: Row, report: Report) -> str:
    """Bytes on disk where there is a file; otherwise nothing: a program in memory is not a file."""
    if row.size is None:
        return ""
    before = report.original.size
    text = f"{count(row.size)}B"
    return text if row is report.original or not before else f"{text} ({before / row.size:.1f}x less)"


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
