"""Budget: what may be left of a program. Meter: what is left of it, in the same units.

    parameters=0.5     at most half of the original's          below 1: a share
    bytes=250000       at most so many                         above 1: an amount
    latency=0.5        half of the time in the target's runtime, of which there are shares only

A pass takes one in its options, by fields named after the units; a search states its goal in one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from graphopt.ir.program import Program
from graphopt.measure.bench import Spread
from graphopt.measure.cost import Cost, cost

UNITS = {"parameters": "parameters", "flops": "FLOPs", "bytes": "bytes", "latency": "latency"}  # what messages say

Shares: TypeAlias = Mapping[str, float]  # of the original, by unit
# A program and a reference; the time of the first over that of the second in the runtime.
Timer: TypeAlias = Callable[[Program, Program], Spread]


@dataclass(frozen=True)
class Budget:
    """What may be left of a program.

    Attributes:
        limits: by unit the largest share of the original, or the largest amount.
    """

    limits: Mapping[str, float]

    def __post_init__(self) -> None:
        """Refuse what is neither a share nor an amount."""
        for unit, limit in self.limits.items():
            if unit == "latency" and not 0 < limit < 1:
                raise ValueError("`latency` is a share of the original's, between 0 and 1")
            if not 0 < limit < 1 and (limit <= 1 or not float(limit).is_integer()):
                raise ValueError(f"`{unit}` is a share of the original's, below 1, or a whole number above it")

    @classmethod
    def of(cls, options: object) -> Budget:
        """Read the fields of a pass's options that are named after units and not None."""
        given = {unit: getattr(options, unit, None) for unit in UNITS}
        return cls({unit: float(limit) for unit, limit in given.items() if limit is not None})

    def shares(self, original: Program) -> Shares:
        """Return what may be left as shares of a program."""
        return {
            unit: limit if limit < 1 else limit / max(getattr(cost(original), unit), 1)
            for unit, limit in self.limits.items()
        }

    def limit(self, unit: str) -> str:
        """Return a limit as it was written, as in `flops=0.5` or `bytes=250000`."""
        limit = self.limits[unit]
        return f"{unit}={limit if limit < 1 else int(limit)}"

    def amount(self, unit: str, share: float, original: Program) -> str:
        """Say how much a share is, in the way the limit is given: as a share or as an amount."""
        if self.limits[unit] < 1:
            return f"{share:.1%} of the {UNITS[unit]}"
        return f"{round(share * getattr(cost(original), unit))} {UNITS[unit]}"


@dataclass
class Meter:
    """Says what is left of a program.

    Attributes:
        original: what shares are of.
        timer: measures in a runtime; None where no latency is asked for.
        timed: every share of the latency measured so far.
    """

    original: Program
    timer: Timer | None = None
    timed: list[float] = field(default_factory=list)

    def left(self, program: Program, wanted: Shares) -> dict[str, float]:
        """Return the share that a program is of the original, in the units of a budget."""
        found = self.left_of(cost(program), wanted)
        if "latency" in wanted:
            assert self.timer is not None  # who wants latency has one
            found["latency"] = self.timer(program, self.original).median
            self.timed.append(found["latency"])
        return found

    def left_of(self, now: Cost, wanted: Shares) -> dict[str, float]:
        """Return the share that a cost is of the original's, in those units of a budget that are no latency."""
        before = cost(self.original)
        static = [unit for unit in UNITS if unit in wanted and unit != "latency"]
        return {unit: getattr(now, unit) / max(getattr(before, unit), 1) for unit in static}


def exceeded(left: Shares, wanted: Shares) -> list[str]:
    """Return the units in which more is left than wanted."""
    return [unit for unit, share in wanted.items() if not left[unit] <= share]


@dataclass
class Guard:
    """Faster than before: tells whether what a pass does pays in the runtime, by more than times vary.

    Attributes:
        timer: measures in it.
        measured: for the plan, by name the share of the time: lower quartile, median, upper quartile.
    """

    timer: Timer
    measured: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    def objects(self, name: str, program: Program, reference: Program) -> str:
        """Return "" if a program is faster than a reference in three rounds of four, else the share of its time."""
        found = self.timer(program, reference)
        self.measured[name] = (found.lower, found.median, found.upper)
        return "" if found.upper < 1 else f"{found.median:.3f} ({found.lower:.3f}-{found.upper:.3f})"
