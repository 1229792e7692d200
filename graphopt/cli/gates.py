"""Gates: `--fail-if "drop>0.5"` ends a build step with exit code 1 when a result is not good enough."""

from __future__ import annotations

import logging
import math
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from graphopt.errors import GateError, UsageError
from graphopt.job.report import Report, Row

logger = logging.getLogger(__name__)

_GATE = re.compile(r"\s*(?P<quantity>[a-z]+%?)\s*(?P<sign><=|>=|<|>)\s*(?P<limit>[-+]?\d+(\.\d+)?(e[-+]?\d+)?)\s*$")
_SIGNS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
QUANTITIES = {
    "drop": "points of the --eval metric lost",
    "drop%": "the same, relative to the original's value",
    "size": "bytes on disk over the original's",
    "speedup": "processor time of the original over the artifact's, on one thread",
    "error": "largest output error over the largest output",
    "agreement": "share of rows whose largest output is at the same place",
}
_ADVICE = {
    "drop": "Give --eval.",
    "drop%": "Give --eval.",
    "size": "Leave out --plan.",
    "speedup": "Lower to a target that executes on this machine, with timing on and without --plan.",
    "error": "Name a pass or a target.",
    "agreement": "It needs outputs of class scores; gate on the error instead.",
}


@dataclass(frozen=True, slots=True)
class Gate:
    """One condition that fails a run when it holds."""

    text: str
    quantity: str
    sign: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Read `quantity sign number`.

        Raises:
            UsageError: it is not of that form, or the quantity is not known.
        """
        match = _GATE.match(text)
        if match is None or match["quantity"] not in QUANTITIES:
            raise UsageError(
                f'Cannot read --fail-if "{text}". Write a quantity, a sign and a number, such as "drop>0.5"; '
                f"quantities are {', '.join(QUANTITIES)}."
            )
        return cls(text, match["quantity"], match["sign"], float(match["limit"]))

    def failures(self, report: Report) -> list[str]:
        """Say for which artifacts (or, without any, for the last pass) the condition holds.

        Raises:
            UsageError: the quantity was measured for none of them.
        """
        rows = report.artifact_rows() or report.rows[-1:]
        values = [(row, _value(self.quantity, row, report)) for row in rows]
        if all(value is None for _, value in values):
            raise self.unmeasured()
        found = []
        for row, value in values:
            if value is None:
                logger.warning("the gate %s says nothing of %s: it was not measured there", self.text, row.label)
            elif math.isnan(value) or _SIGNS[self.sign](value, self.limit):
                found.append(f"{self.quantity} is {value:.4g} for {row.label}, gate is {self.text}")
        return found

    def unmeasured(self) -> UsageError:
        """Explain that there is nothing to look at."""
        return UsageError(
            f"The gate {self.text} has nothing to look at: this run does not measure {self.quantity} "
            f"({QUANTITIES[self.quantity]}). {_ADVICE[self.quantity]}"
        )


def check_measured(gates: Iterable[Gate], *, evaluates: bool, lowers: bool, times: bool) -> None:
    """Refuse, before a run, a gate on what it will not measure.

    Args:
        gates: all of the run.
        evaluates: whether there is a metric.
        lowers: whether there will be artifacts.
        times: whether the run times those of at least one target.

    Raises:
        UsageError: there is such a gate.
    """
    there = {"drop": evaluates, "drop%": evaluates, "size": lowers, "speedup": lowers and times}
    for gate in gates:
        if not there.get(gate.quantity, True):
            raise gate.unmeasured()


def check(gates: Iterable[Gate], report: Report) -> None:
    """Look at what was measured, and at what passes were asked for.

    Raises:
        GateError: a condition holds for an artifact, or its quantity is not a number there; a pass missed its goal.
        UsageError: a quantity was not measured.
    """
    failures = [*report.unmet, *(failure for gate in gates for failure in gate.failures(report))]
    if failures:
        raise GateError("; ".join(failures) + ".")


def _value(quantity: str, row: Row, report: Report) -> float | None:
    """Return a quantity of an artifact, None where it was not measured."""
    before = report.baseline(row)
    if quantity in ("drop", "drop%") and row.metric is not None and report.original.metric is not None:
        drop = report.original.metric - row.metric
        if quantity == "drop" or drop == 0 or math.isnan(drop):
            return drop
        return 100 * drop / abs(report.original.metric) if report.original.metric else math.copysign(math.inf, drop)
    if quantity == "size" and row.size is not None and before.size:
        return row.size / before.size
    if quantity == "speedup" and row.latency is not None:
        return row.latency.speedup
    if quantity == "error" and row.error is not None:
        return row.error.relative
    if quantity == "agreement" and row.error is not None:
        return row.error.agreement
    return None
