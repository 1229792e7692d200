"""What is asked of a program: what may be lost of its accuracy, and what has to be saved; measured, not predicted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from graphopt.ir.program import Program
from graphopt.measure.budget import Budget, Meter
from graphopt.measure.cost import cost
from graphopt.measure.decibels import decibels
from graphopt.measure.equivalence import OutputError
from graphopt.passes.mixing.forms import FormSite, compose
from graphopt.pipeline.context import Context
from graphopt.statistics.calibration import read_batches
from graphopt.statistics.sensitivity import Altered

_JUDGED, _TOGETHER = 256, 32  # samples
_SLACK = 1e-9


class Asked(Protocol):
    """What of the options says what is asked."""

    @property
    def max_drop(self) -> float | None: ...
    @property
    def min_sqnr(self) -> float | None: ...
    @property
    def min_speedup(self) -> float | None: ...
    @property
    def bytes(self) -> float | None: ...
    @property
    def fill_up(self) -> bool: ...


@dataclass(frozen=True)
class Candidate:
    """Forms that were tried.

    Attributes:
        chosen: by name of the site its form.
        measured: what was measured: points lost, dB, shares of bytes and of the time that are left.
        excess: by what is measured, how far it is beyond its limit.
    """

    chosen: Mapping[str, str]
    measured: Mapping[str, float]
    excess: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Loss:
    """What is lost: what it is called, what measures it, and how far that is beyond its limit."""

    unit: str
    of: Callable[[Program | Altered], float]
    beyond: Callable[[float], float]


class Goal:
    """Measures candidates against what is asked.

    Attributes:
        limits: by unit the share of the original's that may be left.
    """

    def __init__(self, asked: Asked, program: Program, ctx: Context, name: str) -> None:
        """Measure the original.

        Raises:
            DataError: there are no labelled data to see what is lost.
            PassError: time is asked about and cannot be measured.
        """
        self._asked, self._program, self._ctx = asked, program, ctx
        limits = {} if asked.bytes is None else {"bytes": asked.bytes}
        if asked.min_speedup is not None:
            limits["latency"] = 1 / asked.min_speedup
        self.limits = Budget(limits).shares(ctx.original)
        self._meter = Meter(ctx.original, ctx.need_timer(name) if "latency" in limits else None)
        self._lost = self._loss(name)

    def to_save(self) -> dict[str, float]:
        """Return what has to be saved of each unit that is limited: bytes, shares of the original's time."""
        left = self._meter.left(self._program, self.limits)
        return {unit: self._amount(unit, left[unit] - share) for unit, share in self.limits.items()}

    def predicted(self, sites: Sequence[FormSite], chosen: Mapping[str, str]) -> float:
        """Return how far what is lost is beyond its limit, run as calls that compute otherwise; below 0: within it."""
        if self._lost is None:
            return -math.inf
        knobs = [site.knobs[form] for site in sites if (form := chosen[site.name]) in site.knobs]
        return self._lost.beyond(self._lost.of(Altered(self._program, knobs)))

    @property
    def limits_loss(self) -> bool:
        """Whether there is a limit on what is lost."""
        return self._lost is not None

    def loses_too_much(self, candidate: Candidate) -> bool:
        """Whether a candidate loses more than it may, whatever it saves."""
        return self._lost is not None and self._lost.unit in candidate.excess

    def attempt(self, sites: Sequence[FormSite], chosen: Mapping[str, str]) -> Candidate:
        """Make the program of some forms and measure it."""
        _, made = compose(self._program, self._ctx, sites, chosen, fill_up=self._asked.fill_up)
        measured = self._meter.left(made, self.limits)
        excess = {unit: self._amount(unit, measured[unit] - share) for unit, share in self.limits.items()}
        if self._lost is not None:
            measured[self._lost.unit] = self._lost.of(made)
            excess[self._lost.unit] = self._lost.beyond(measured[self._lost.unit])
        if made is not self._program:
            self._ctx.forget(made)
        return Candidate(chosen, measured, {unit: beyond for unit, beyond in excess.items() if not beyond <= _SLACK})

    def distance(self, candidate: Candidate) -> tuple[int, float]:
        """Return how many limits a candidate misses, and how far it is beyond them, each a share of what it limits."""
        asked = {"bytes": cost(self._ctx.original).bytes, "drop": 100.0, "sqnr": self._asked.min_sqnr or 1.0}
        beyond = [amount / asked.get(unit, 1.0) for unit, amount in candidate.excess.items()]
        return len(beyond), sum(beyond)

    def missed(self, best: Candidate) -> list[str]:
        """Say which limits a candidate does not meet."""
        asked, found = self._asked, best.measured
        said = {
            "drop": f"max_drop={asked.max_drop}: {found.get('drop', 0):.3g} points are lost",
            "sqnr": f"min_sqnr={asked.min_sqnr}: outputs are {found.get('sqnr', 0):.1f} dB from the original's",
            "latency": f"min_speedup={asked.min_speedup}: it is {1 / found.get('latency', 1):.2f}x as fast",
            "bytes": f"bytes={asked.bytes}: {found.get('bytes', 1):.1%} of the bytes are left",
        }
        return [said[unit] for unit in best.excess]

    def _loss(self, name: str) -> _Loss | None:
        asked, ctx = self._asked, self._ctx
        if asked.max_drop is not None:
            limit, metric = asked.max_drop, ctx.need_metric(name, "to see how much is lost (min_sqnr=25 needs none)")
            before = metric(ctx.original)
            return _Loss("drop", lambda model: before - metric(model), lambda drop: drop - limit)
        if asked.min_sqnr is None:
            return None
        wanted, judging = asked.min_sqnr, ctx.held_out or ctx.need_samples(name, "to see how much is lost")
        error = OutputError(ctx.original, read_batches(ctx.original, judging, limit=_JUDGED, batch_size=_TOGETHER))
        return _Loss("sqnr", lambda model: decibels(1.0, error.of(model.call_flat)), lambda ratio: wanted - ratio)

    def _amount(self, unit: str, share: float) -> float:
        """Return a share of the original's as what sites save is counted in."""
        return share * cost(self._ctx.original).bytes if unit == "bytes" else share
