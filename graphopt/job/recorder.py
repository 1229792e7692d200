"""The recorder: a hook that turns what happens to a program into the rows of a report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from graphopt.ir.program import Program
from graphopt.job.report import Report, Row
from graphopt.measure.cost import cost
from graphopt.measure.equivalence import Probe
from graphopt.pipeline.hooks import Hook
from graphopt.pipeline.order import Step
from graphopt.pipeline.plan import Plan

Score = Callable[[Callable[..., Any]], float]


@dataclass
class Recorder(Hook):
    """Writes a row after each step: cost, distance from the original, metric, time.

    Attributes:
        report: where rows and refusals go.
        original: the program that the pipeline started from.
        probe: inputs and original outputs that every other program is compared on.
        metric: value of a program under the user's `eval`, None without one.
    """

    report: Report
    original: Program
    probe: Probe
    metric: Score | None = None
    _started: float = field(default=0.0, init=False)

    def before(self, step: Step, program: Program, target: str) -> None:
        """Start the step's clock."""
        self._started = time.perf_counter()

    def after(self, step: Step, before: Program, after: Program, plan: Plan, target: str) -> None:
        """Add the step's row and its refusals."""
        seconds = time.perf_counter() - self._started
        label = f"{step.text} (for {step.inserted_for})" if step.inserted_for else step.text
        self.report.add_plan(plan)
        self.report.rows.append(self._row(label, target, after, seconds, plan.summary()))

    def _row(self, label: str, target: str, program: Program, seconds: float | None, summary: str) -> Row:
        error = None if program is self.original else self.probe.measure(program.call_flat, declared=program.outputs)
        value = self.metric(program) if self.metric else None
        return Row(label, target, cost(program), None, error, value, None, None, seconds, summary)
