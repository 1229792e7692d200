"""Tables of what `bench_quantization` measured, and what in them is not as it should be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from graphopt.measure.bench import Spread, ratios

_OURS = "graphopt"
_INTEGER = ("QLinear", "QGemm", "MatMulInteger", "DynamicQuantize", "MatMulNBits", "ConvInteger", "QAttention")
_COULD_BE = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "LSTM")

_Row = Mapping[str, Any]


def report(machine: Mapping[str, str], rows: Sequence[_Row], baseline: str, *, zoo: bool) -> None:
    """Print what was measured of each model, and what is slower than it should be."""
    console = Console(width=200)
    console.print(", ".join(f"{name} {said}" for name, said in machine.items()))
    names = list(dict.fromkeys(name for row in rows for name in row["tools"] if name != baseline))
    console.print(_table(rows, names, baseline))
    for said in [*_findings(rows, baseline), *(_summary(rows, names, baseline) if zoo else ())]:
        console.print(said, highlight=False)


def _table(rows: Sequence[_Row], names: Sequence[str], baseline: str) -> Table:
    table = Table(title="times faster than float32, median (quartiles), by batch; SQNR; MB; top-1", show_lines=True)
    table.add_column("model")
    table.add_column("float32")
    for name in names:
        table.add_column(name)
    for row in rows:
        cells = [_cell(row, name, baseline) for name in names]
        table.add_row(row["model"] + (f"\n{row['problem']}" if row["problem"] else ""), _plain(row, baseline), *cells)
    return table


def _plain(row: _Row, baseline: str) -> str:
    tool = row["tools"].get(baseline)
    if tool is None:
        return ""
    times = " / ".join(f"{median(each):.2f}" for each in tool["milliseconds"].values())
    top1 = "" if tool["top1"] is None else f"\n{tool['top1']:.2f} %"
    return f"{times} ms\n{tool['size'] / 1e6:.1f} MB{top1}"


def _cell(row: _Row, name: str, baseline: str) -> str:
    tool = row["tools"].get(name)
    if tool is None:
        return ""
    if not tool["milliseconds"]:
        return f"{tool['note']}" + ("" if tool["engine"] is None else f": {tool['engine']:.3f}x memory")
    lines = [_shown(_ratio(row, baseline, name, batch)) for batch in tool["milliseconds"]]
    top1 = "" if tool["top1"] is None else f", {tool['top1']:.2f} %"
    lines.append(f"{tool['sqnr']:.1f} dB, {tool['size'] / 1e6:.1f} MB{top1}")
    if name.startswith(_OURS):
        left = ", ".join(f"{count} {kind}" for kind, count in tool["kernels"].items() if kind in _COULD_BE)
        lines.append(f"left float: {left or 'nothing'}")
    return "\n".join([*lines, *([tool["note"]] if tool["note"] else [])])


def _ratio(row: _Row, first: str, second: str, batch: str) -> Spread:
    times = [row["tools"][name]["milliseconds"][batch] for name in (first, second)]
    return ratios(*times)


def _first(row: _Row, first: str, second: str) -> Spread:
    """Return the ratio at the first batch size."""
    return _ratio(row, first, second, next(iter(row["tools"][first]["milliseconds"])))


def _shown(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.lower:.2f}-{spread.upper:.2f})"


def _findings(rows: Iterable[_Row], baseline: str) -> Iterable[str]:
    """Say where graphopt fails, is slower than float32, or than a peer of no larger error."""
    for row in rows:
        if row["problem"]:
            yield f"{row['model']}: {row['problem']}"
        ours = {name: tool for name, tool in row["tools"].items() if name.startswith(_OURS)}
        for name, tool in ours.items():
            if not tool["milliseconds"]:
                yield f"{row['model']}, {name}: {tool['note']}"
            for batch in tool["milliseconds"]:
                if (spread := _ratio(row, baseline, name, batch)).upper < 1:
                    yield f"{row['model']}, {name}, batch {batch}: slower than float32, {_shown(spread)}"
                for peer, other in _timed(row, baseline).items():
                    spread = _ratio(row, peer, name, batch)
                    if spread.upper < 1 and other["sqnr"] >= tool["sqnr"]:
                        sqnr = f"{tool['sqnr']:.1f} dB to {other['sqnr']:.1f}"
                        yield f"{row['model']}, {name}, batch {batch}: behind {peer}, {_shown(spread)}, {sqnr}"


def _timed(row: _Row, baseline: str) -> dict[str, Any]:
    """Return the peers that were timed."""
    tools = row["tools"].items()
    return {n: tool for n, tool in tools if n != baseline and not n.startswith(_OURS) and tool["milliseconds"]}


def _summary(rows: Sequence[_Row], names: Sequence[str], baseline: str) -> Iterable[str]:
    """Say how a zoo fares as a whole, at the first batch size."""
    whole = [row for row in rows if any(tool["milliseconds"] for tool in row["tools"].values())]
    best = [[1.0, *(_first(row, baseline, name).median for name in _timed(row, baseline))] for row in whole]
    yield f"{len(whole)} of {len(rows)} models; median speed-up of each one's best peer {median(map(max, best)):.2f}"
    for name in names:
        found = {
            row["model"]: _first(row, baseline, name) for row in whole if row["tools"].get(name, {}).get("milliseconds")
        }
        if not found:
            continue
        slower = [f"{model} {_shown(spread)}" for model, spread in found.items() if spread.upper < 1]
        yield (
            f"{name}: {len(found)} models, median speed-up {median(s.median for s in found.values()):.2f}, "
            f"{len(slower)} slower than float32 by more than the spread: {', '.join(slower) or 'none'}"
        )
    for row in whole:
        for name, tool in row["tools"].items():
            if name.startswith(_OURS) and tool["kernels"] and not _integers(tool):
                peers = {peer: _first(row, baseline, peer) for peer in _timed(row, baseline)}
                said = ", ".join(f"{peer} {_shown(spread)}" for peer, spread in peers.items())
                yield f"{row['model']}, {name}: wholly float; {said}; {'; '.join(tool['left'][:3])}"


def _integers(tool: Mapping[str, Any]) -> int:
    return sum(count for kind, count in tool["kernels"].items() if kind.startswith(_INTEGER))
