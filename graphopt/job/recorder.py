"""The recorder: a hook that turns what happens to a program into the rows of a report."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from graphopt.caching.digests import digest_of, of_evaluation
from graphopt.caching.steps import StepCache
from graphopt.ir.program import Program
from graphopt.ir.provenance import module_path
from graphopt.job.report import Report, Row, of_target, row_from_json, row_to_json
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
        cache: what was measured before, None for nothing.
        several: whether there are several targets, so that notes say which one they are on.
    """

    report: Report
    original: Program
    probe: Probe
    metric: Score | None = None
    cache: StepCache | None = None
    several: bool = False
    _started: float = field(default=0.0, init=False)

    def before(self, step: Step, program: Program, target: str) -> None:
        """Start the step's clock."""
        self._started = time.perf_counter()

    def after(self, step: Step, before: Program, after: Program, plan: Plan, target: str) -> None:
        """Add the step's row and its refusals."""
        seconds = time.perf_counter() - self._started
        label = f"{step.text} (for {step.inserted_for})" if step.inserted_for else step.text
        one = target if self.several else ""
        self.report.add_plan(plan, one, named=_named(before))
        if not plan.sites and not step.inserted_for:
            self.report.notes.append(f"{of_target(step.text, one)}: it changed nothing ({plan.summary()})")
        self.report.rows.append(self._row(label, target, after, seconds, plan.summary()))

    def _row(self, label: str, target: str, program: Program, seconds: float | None, summary: str) -> Row:
        row = self.known(program)
        return dataclasses.replace(row, label=label, target=target, seconds=seconds, summary=summary)

    def known(self, program: Program) -> Row:
        """Return what is measured of a program, found in the cache where all that it is measured with has a digest."""
        if self.cache is None or self._by is None:
            return self._measured(program)
        found = self.cache.measured(program, self._by, lambda: row_to_json(self._measured(program)), row_from_json)
        return row_from_json(found)

    def _measured(self, program: Program) -> Row:
        error = None if program is self.original else self.probe.measure(program.call_flat, declared=program.outputs)
        return Row("", cost=cost(program), error=error, metric=self.metric(program) if self.metric else None)

    @functools.cached_property
    def _by(self) -> str | None:
        """Digest of what programs are measured with, None where that is a function of the user's."""
        judge = "" if self.metric is None else of_evaluation(self.metric)
        if judge is None or self.cache is None:
            return None
        return digest_of(self.cache.memory.digest(self.original), self.probe.batch, judge)


def _named(program: Program) -> dict[str, str]:
    """Return the modules that run the calls of a program, by their names; with these, where a module runs several."""
    paths = {node.name: module_path(node) for node in program.graph.nodes if node.op == "call_function"}
    counts = Counter(paths.values())
    return {name: path if counts[path] == 1 else f"{path} ({name})" for name, path in paths.items() if path}
