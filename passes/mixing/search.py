"""Finds the forms that meet a limit, by the noise each alone brings and what each saves, and looks at what comes of it.

What is chosen adds noise and savings up, which is right to first order only: the budget of noise is the largest whose
choice holds when it is run, and what holds then is made into a program and measured, with a smaller budget until it
holds there as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from graphopt.measure.selection import select
from graphopt.passes.mixing.forms import FLOAT, FormSite
from graphopt.passes.mixing.goal import Candidate, Goal

Chosen = Mapping[str, str]  # by name of the site its form
_FINEST = 1e-12  # of the outputs' power: no budget is smaller
_TIGHTER = 0.6  # a budget that did not hold times this is the next


class FormSearch:
    """Tries forms.

    Attributes:
        made: candidates that were made into programs, by what was chosen, in order.
        notes: what a user should know of how it went.
    """

    def __init__(self, sites: Sequence[FormSite], goal: Goal, runs: int, trials: int) -> None:
        """Prepare to search.

        Args:
            sites: what has forms.
            goal: what is asked.
            runs: choices that are run, at most.
            trials: choices that are made into programs, at most, besides the cheapest and that of float32 alone.
        """
        self._sites, self._goal, self._runs, self._trials = sites, goal, runs, trials
        self.made: dict[tuple[str, ...], Candidate] = {}
        self.notes: list[str] = []

    def least(self, unit: str) -> Candidate:
        """Return what costs least of a unit, "bytes" or "latency", and loses no more than it may."""
        found = self._losing_little(unit)
        if found is not None:
            return found
        self.notes.append(
            f"none of {len(self.made)} choices lost as little when it was made as it seemed to, so all weights stay "
            "float32; more trials= may find one"
        )
        return self._make({site.name: FLOAT for site in self._sites})

    def closest(self, limits: Mapping[str, float]) -> Candidate:
        """Return what brings the least noise and meets limits on units, as measured; else what comes nearest.

        Args:
            limits: by unit, what must be saved at least.
        """
        wanted = dict(limits)
        for _ in range(self._trials):
            try:
                candidate = self._make(self._select("noise", {unit: -amount for unit, amount in wanted.items()}))
            except _ImpossibleError:
                break
            missing = {unit: candidate.excess[unit] for unit in wanted if unit in candidate.excess}
            if not missing:
                return candidate
            for unit, excess in missing.items():  # that much more has to be saved than this seemed to
                seemed = sum(site.saves(candidate.chosen[site.name], unit) for site in self._sites)
                wanted[unit] = max(wanted[unit], seemed) + excess
        unit = next(iter(limits))
        self._make(self._select(unit, {}))
        if self._goal.limits_loss:
            self._losing_little(unit)
        return min(self.made.values(), key=self._goal.distance)

    def _losing_little(self, unit: str) -> Candidate | None:
        """Make what saves most of a unit and loses no more than it may, with smaller budgets until it does not."""
        chosen, budget = self._within(unit)
        for _ in range(self._trials):
            candidate = self._make(chosen)
            if not self._goal.loses_too_much(candidate):
                return candidate
            before = chosen
            while chosen == before and budget > _FINEST:
                budget *= _TIGHTER
                chosen = self._select(unit, {"noise": budget})
        return None

    def _within(self, unit: str) -> tuple[Chosen, float]:
        """Return the forms of the largest budget whose choice holds when it is run, and that budget."""
        best = self._select(unit, {})
        high = sum(site.noise[best[site.name]] for site in self._sites)
        if self._goal.predicted(self._sites, best) <= 0:
            return best, high
        low, known = _FINEST, {tuple(best.values()): False}
        best = self._select(unit, {"noise": low})
        for _ in range(self._runs):
            middle = math.sqrt(low * high)
            chosen = self._select(unit, {"noise": middle})
            key = tuple(chosen.values())
            if key not in known:
                known[key] = self._goal.predicted(self._sites, chosen) <= 0
            if known[key]:
                best, low = chosen, middle
            else:
                high = middle
        return best, low

    def _select(self, minimize: str, limits: Mapping[str, float]) -> Chosen:
        settings = [
            [
                {"noise": noise, **{unit: -site.saves(form, unit) for unit in ("bytes", "latency")}}
                for form, noise in site.noise.items()
            ]
            for site in self._sites
        ]
        found = select(settings, minimize, limits)
        if found is None:
            raise _ImpossibleError
        return {site.name: list(site.noise)[index] for site, index in zip(self._sites, found, strict=True)}

    def _make(self, chosen: Chosen) -> Candidate:
        key = tuple(chosen.values())
        if key not in self.made:
            self.made[key] = self._goal.attempt(self._sites, chosen)
        return self.made[key]


class _ImpossibleError(Exception):
    """No choice is thought to save so much."""
