"""Gates: `--fail-if "drop>0.5"` ends a build step with exit code 1 when a result is not good enough."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from graphopt.errors import UsageError
from graphopt.job.report import Report, Row

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
    "speedup": "latency of the original over the artifact's",
    "error": "largest output error over the largest output",
    "agreement": "share of rows whose largest output is at the same place",
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
        """Say for which artifacts (or, without any, for the last pass) the condition holds, or cannot be told."""
        rows = report.artifact_rows() or report.rows[-1:]
        found = []
        for row in rows:
            value = _value(self.quantity, row, report)
            if math.isnan(value) or _SIGNS[self.sign](value, self.limit):
                found.append(f"{self.quantity} is {value:.4g} for {row.label}, gate is {self.text}")
        return found


def _value(quantity: str, row: Row, report: Report) -> float:
    before = report.original
    if quantity in ("drop", "drop%") and row.metric is not None and before.metric is not None:
        drop = before.metric - row.metric
        if quantity == "drop" or drop == 0:
            return drop
        return 100 * drop / abs(before.metric) if before.metric else math.copysign(math.inf, drop)
    if quantity == "size" and row.size is not None and before.size:
        return row.size / before.size
    if quantity == "speedup" and row.latency is not None and row.latency.speedup is not None:
        return row.latency.speedup
    if quantity == "error" and row.error is not None:
        return row.error.relative
    if quantity == "agreement" and row.error is not None and row.error.agreement is not None:
        return row.error.agreement
    raise UsageError(
        f"The gate on `{quantity}` has nothing to look at: {QUANTITIES[quantity]} was not measured in this run. "
        f"{'Give --eval.' if quantity.startswith('drop') else 'Lower to a target and leave timing on.'}"
    )
