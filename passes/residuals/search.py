"""Chooses which residual branches go: the one that contributes least, then again among what is left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphopt.data.batches import Batch, SampleSource
from graphopt.ir.plain_data import Json
from graphopt.ir.program import Program
from graphopt.measure.decibels import decibels
from graphopt.measure.equivalence import OutputError
from graphopt.passes.residuals.branches import Branch, find_branches, stored_parameters
from graphopt.passes.residuals.contribution import Criterion, influences, output_errors
from graphopt.passes.residuals.removal import fits_without, without
from graphopt.pipeline.context import Context
from graphopt.statistics.calibration import read_batches

_BATCH = 32  # samples run at once


@dataclass(frozen=True, slots=True)
class Limits:
    """How far a search goes.

    Attributes:
        most: branches dropped at most.
        sqnr: dB that the outputs stay within, None for no such limit.
        samples: calibration samples used at most.
        rescore: whether what is left is measured again after each drop.
    """

    most: int
    sqnr: float | None
    samples: int
    rescore: bool


class Search:
    """Drops the branch that contributes least, looks at what is left, and so on.

    Attributes:
        dropped: what the plan records of the branches that go, by their key, in order.
        scores: by key, the last score of each branch that was measured.
        blocked: by key, why a branch that was found cannot go after all.
        left: keys of the branches that could still have gone at the end.
        over_limit: signal-to-noise ratio that the next drop would have led to, None where no limit was met.
    """

    def __init__(
        self, program: Program, ctx: Context, criterion: Criterion, limits: Limits, allowed: set[str], by: str
    ) -> None:
        self.dropped: dict[str, dict[str, Json]] = {}
        self.scores: dict[str, float] = {}
        self.blocked: dict[str, str] = {}
        self.left: set[str] = set()
        self.over_limit: float | None = None
        self._program = program
        self._ctx = ctx
        self._criterion = criterion
        self._limits = limits
        self._allowed = allowed
        self._by = by
        self._gone: set[str] = set()
        self._batches: list[Batch] = []
        self._error: OutputError | None = None
        self._judge: OutputError | None = None

    def run(self) -> None:
        """Drop branches until a limit is met or none is left.

        Raises:
            DataError: the criterion or a limit needs data, and there is none.
        """
        if self._limits.most and (self._criterion in ("output", "influence") or self._limits.sqnr is not None):
            purpose = "to measure what each branch contributes (criterion=last with blocks or ratio needs none)"
            samples = self._ctx.need_samples(self._by, purpose)
            self._batches = self._read(samples)
            self._error = self._judge = OutputError(self._program, self._batches)
            if self._ctx.held_out is not None:  # what is chosen by some samples looks better on them than on others
                self._judge = OutputError(self._program, self._read(self._ctx.held_out))
        current = self._program
        eligible = self._eligible(current)
        while eligible and len(self.dropped) < self._limits.most:
            branch = self._least(current, eligible)
            following = without(current, [branch.result.name], self._by)
            if self._limits.sqnr is not None and self._beyond(following, self._limits.sqnr):
                break
            self._note(branch, current)
            current = following
            eligible = self._eligible(current)
        self.left = {branch.key for branch in eligible}

    def _read(self, samples: SampleSource) -> list[Batch]:
        return read_batches(self._program, samples, limit=self._limits.samples, batch_size=_BATCH)

    def took(self, branch: Branch) -> bool:
        """Whether `branch`, of the program before, went with a block around it."""
        return branch.sum.name in self._gone

    def _eligible(self, current: Program) -> list[Branch]:
        """List the branches that may go now; where nothing is measured, only those with no other inside."""
        branches = [b for b in find_branches(current.graph_module)[0] if b.key in self._allowed]
        if self._criterion in ("random", "last"):
            branches = [branch for branch in branches if not any(branch.holds(other) for other in branches)]
        for branch in branches:
            if not fits_without(current, branch, self._by):
                self.blocked[branch.key] = "its shortcut lies otherwise in memory than a view behind it takes"
        return [branch for branch in branches if branch.key not in self.blocked]

    def _least(self, current: Program, eligible: Sequence[Branch]) -> Branch:
        unknown = [branch for branch in eligible if self._limits.rescore or branch.key not in self.scores]
        if unknown:
            for branch, score in zip(unknown, self._measure(current, unknown), strict=True):
                self.scores[branch.key] = score
        # of equals the largest, of those the first
        return min(eligible, key=lambda branch: (self.scores[branch.key], -len(branch.nodes)))

    def _measure(self, current: Program, branches: Sequence[Branch]) -> list[float]:
        criterion = self._criterion
        if criterion == "output":
            assert self._error is not None  # `run` has made it
            return output_errors(current, branches, self._error, self._ctx.progress, self._by)
        if criterion == "influence":
            return influences(current, branches, self._batches)
        if criterion == "random":
            generator = self._ctx.generator(f"{self._by}/{len(self.dropped)}")
            return torch.rand(len(branches), generator=generator).tolist()
        order = {node: index for index, node in enumerate(current.graph.nodes)}
        return [-float(order[branch.sum]) for branch in branches]

    def _beyond(self, following: Program, limit: float) -> bool:
        assert self._judge is not None  # `run` has made it
        found = decibels(1.0, self._judge.of(following.call_flat))
        if found < limit:
            self.over_limit = found
        return found < limit

    def _note(self, branch: Branch, current: Program) -> None:
        score = self.scores[branch.key]
        self._gone.update(node.name for node in branch.nodes)
        self.dropped[branch.key] = {
            "kind": branch.kind,
            "result": branch.result.name,
            "sum": branch.sum.name,
            "calls": len(branch.nodes) + 1,
            "parameters": stored_parameters(branch.nodes, current.graph_module),
            "score": score if math.isfinite(score) else None,
        }
