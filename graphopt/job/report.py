"""Report: what a run did to a model, as data. The command line and `report.json` are two views of it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pydantic

from graphopt.errors import cut
from graphopt.files import replacing
from graphopt.measure.cost import Cost
from graphopt.measure.equivalence import Equivalence
from graphopt.pipeline.plan import Plan, Refusal

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Latency:
    """Time of one call of a session, and of the float32 original measured in turn with it.

    Attributes:
        session: which session was measured: options ("recorded" or "plain") and threads.
        batch: samples per call.
        milliseconds: median wall-clock time of a call.
        spread: first and third quartile of the same.
        speedup: processor time of the original over this, median of the pairs; None for the original itself. 1 where
            nothing was rewritten: nothing is paired then.
        speedup_spread: first and third quartile of the pairs' ratios, None without pairs.
    """

    session: str
    batch: int
    milliseconds: float
    spread: tuple[float, float]
    speedup: float | None = None
    speedup_spread: tuple[float, float] | None = None

    @property
    def speedup_text(self) -> str | None:
        """The speed-up and, where there are pairs, its quartiles: `3.84x (3.61-4.20)`."""
        if self.speedup is None:
            return None
        spread = self.speedup_spread
        return f"{self.speedup:.2f}x" + (f" ({spread[0]:.2f}-{spread[1]:.2f})" if spread else "")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the before/after table: the original, a pass, or an artifact.

    Attributes:
        label: "original", the text of the pass, or the file.
        target: the target it belongs to, "" before the pipeline forks.
        cost: parameters, FLOPs and bytes of the program.
        size: bytes on disk, for artifacts (and the original, lowered as it is).
        error: distance from the original program's outputs on real or example inputs.
        metric: value of `eval`.
        latency: measured on the recorded session options.
        plain: measured on a plain session of the runtime.
        seconds: time the step took, checks included.
        summary: what the pass matched, rewrote and left.
    """

    label: str
    target: str = ""
    cost: Cost | None = None
    size: int | None = None
    error: Equivalence | None = None
    metric: float | None = None
    latency: Latency | None = None
    plain: Latency | None = None
    seconds: float | None = None
    summary: str = ""

    def __str__(self) -> str:
        """Return what is known of it in one line."""
        facts = {
            "parameters": self.cost and self.cost.parameters,
            "FLOPs": self.cost and self.cost.flops,
            "bytes on disk": self.size,
            "ms": self.latency and round(self.latency.milliseconds, 3),
            "speed-up": self.latency and self.latency.speedup_text,
            "relative error": self.error and float(f"{self.error.relative:.1e}"),
            "metric": self.metric and round(self.metric, 2),
        }
        known = ", ".join(f"{value} {name}" for name, value in facts.items() if value is not None)
        return f"{self.label}{f' for {self.target}' if self.target else ''}: {known}"


@dataclass
class Report:
    """Everything a run has to say.

    Attributes:
        model: what was optimised, by file name or class.
        pipeline: the pipeline with inserted passes.
        metric: name of the metric, "" without `eval`.
        rows: the original first, then each pass, then each artifact. Size and latency of the original are those for
            the first target.
        facts: what each backend found out while lowering.
        baselines: by target the original, lowered as it is, which that target's artifact is compared with; none where
            nothing was compared.
        refusals: (pass, refusal) of every site left alone.
        notes: what a user should know.
        unmet: what passes were asked for and did not reach.
        files: what was written, relative to the output directory.
    """

    model: str
    pipeline: str
    metric: str = ""
    rows: list[Row] = field(default_factory=list)
    refusals: list[tuple[str, Refusal]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unmet: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    facts: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    baselines: dict[str, Row] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return a line for each row; the command line draws them as a table."""
        return "\n".join([f"{self.model}: {self.pipeline}", *map(str, self.rows)])

    @property
    def original(self) -> Row:
        """The row every other is compared with."""
        return self.rows[0]

    def baseline(self, row: Row) -> Row:
        """Return what a row is compared with: the original as it is lowered for the row's target, if it was."""
        return self.baselines.get(row.target, self.original)

    def copy(self) -> Report:
        """Return a report that can be added to without changing this one."""
        return dataclasses.replace(
            self,
            rows=list(self.rows),
            refusals=list(self.refusals),
            notes=list(self.notes),
            unmet=list(self.unmet),
            files=list(self.files),
            facts=dict(self.facts),
            baselines=dict(self.baselines),
        )

    def add_artifact(self, row: Row, baseline: Row | None) -> None:
        """Add the row of an artifact, and of the original that it is compared with, if it was lowered."""
        self.rows.append(row)
        if baseline is None:
            return
        if not self.baselines:
            self.rows[0] = dataclasses.replace(
                self.original, size=baseline.size, latency=baseline.latency, plain=baseline.plain
            )
        self.baselines[row.target] = baseline

    def row(self, label: str, target: str = "") -> Row:
        """Return the last row with this label (and target, if given)."""
        return [row for row in self.rows if row.label == label and target in ("", row.target)][-1]

    def artifact_rows(self) -> list[Row]:
        """List the rows of lowered artifacts."""
        return [row for row in self.rows[1:] if row.size is not None]

    def add_plan(self, plan: Plan, for_target: str = "", named: Mapping[str, str] = MappingProxyType({})) -> None:
        """Take over the refusals and notes of a plan.

        Args:
            plan: the plan.
            for_target: one of several targets that it was made for; "": for all.
            named: what is known by another name to who wrote the model.
        """
        name = of_target(plan.pass_name, for_target)
        self.notes += [f"{name}: {note}" for note in plan.notes]
        self.unmet += [f"{name}: {text}" for text in plan.unmet]
        self.refusals += [
            (plan.pass_name, dataclasses.replace(refusal, site=named.get(refusal.site, refusal.site)))
            for refusal in plan.refusals
        ]

    def refusal_counts(self) -> list[tuple[str, str, int, str]]:
        """Count refusals: (pass, reason, count, first site)."""
        counts = Counter((name, refusal.counted_as) for name, refusal in self.refusals)
        first: dict[tuple[str, str], str] = {}
        for name, refusal in self.refusals:
            first.setdefault((name, refusal.counted_as), refusal.site)
        return [(name, reason, count, first[name, reason]) for (name, reason), count in counts.most_common()]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON data; infinities are null."""
        data: dict[str, Any] = _finite({"schema": SCHEMA, **dataclasses.asdict(self)})
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """Read what `to_json` returned.

        Raises:
            ValueError: it is of another form.
        """
        if data.get("schema") != SCHEMA:
            raise ValueError(f"it has schema {cut(repr(data.get('schema')), 80)}, this version reads {SCHEMA}")
        fields = {name: value for name, value in data.items() if name != "schema"}
        rows, baselines = fields.get("rows"), fields.get("baselines")
        if isinstance(rows, list):
            fields["rows"] = [_with_its_infinities(row) for row in rows]
        if isinstance(baselines, dict):
            fields["baselines"] = {target: _with_its_infinities(row) for target, row in baselines.items()}
        report: Report = pydantic.TypeAdapter(cls).validate_json(json.dumps(fields), strict=True)
        if not report.rows:
            raise ValueError("it has no row of the original")
        return report

    def save(self, path: Path) -> Path:
        """Write `report.json`."""
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.to_json(), indent=1) + "\n")
        return path


def row_to_json(row: Row) -> dict[str, Any]:
    """Return a row as JSON data; infinities are null."""
    data: dict[str, Any] = _finite(dataclasses.asdict(row))
    return data


def row_from_json(data: Mapping[str, Any]) -> Row:
    """Read what `row_to_json` returned.

    Raises:
        ValueError: it is of another form.
    """
    row: Row = pydantic.TypeAdapter(Row).validate_json(json.dumps(_with_its_infinities(data)), strict=True)
    return row


def of_target(name: str, target: str) -> str:
    """Return what notes on one of several targets start with, or on all, ""."""
    return f"{name} for {target}" if target else name


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _with_its_infinities(row: Any) -> Any:
    """Undo `_finite` in a row's error: what is no number is infinite, and the ratio to no error at all is too."""
    error = row.get("error") if isinstance(row, dict) else None
    if not isinstance(error, dict):
        return row
    known = {name: math.inf if error.get(name) is None else error[name] for name in ("max_error", "relative")}
    ratio = error.get("sqnr")
    if ratio is None:
        ratio = math.inf if known["relative"] == 0 else -math.inf
    return {**row, "error": {**error, **known, "sqnr": ratio}}
