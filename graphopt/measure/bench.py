"""Latency of two artifacts, measured in turn so that whatever slows the machine down slows both.

A round calls both, alternating who goes first; the ratio is taken within a round. Wall-clock time is what a user
waits; process CPU time leaves out what other processes took and, with one thread, is the steadier of the two.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import numpy as np
import torch

from graphopt.errors import UsageError
from graphopt.ir.batch_sizes import BatchSizes
from graphopt.ir.examples import drawn
from graphopt.ir.signature import TensorSpec
from graphopt.targets.backend import Array, Artifact, Session

_WARM_UP = 3  # calls of each before anything counts: memory arenas, lazy kernels
_FEWEST_ROUNDS = 7  # quartiles of fewer say nothing
_MOST_ROUNDS = 400
_STEADY, _CLOSE = 1.5, 1.1  # third over first quartile at most; wall-clock against CPU time, however steady
_SHORTEST_BURST = 0.002  # seconds; shorter calls are repeated within a round until clock reads are noise


@dataclass(frozen=True, slots=True)
class Spread:
    """Where repeated measurements of one thing lie."""

    minimum: float
    lower: float  # first quartile
    median: float
    upper: float  # third quartile
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        lower, _, upper = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
        return cls(min(values), lower, median(values), upper, max(values))


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds that one call takes."""

    wall: Spread
    cpu: Spread


@dataclass(frozen=True, slots=True)
class TimedPair:
    """Two sessions timed in turn; or one, whose ratio to itself is 1.

    Attributes:
        first: times of the first.
        second: times of the second.
        wall_ratio: first over second, wall-clock, one value a round. Above 1: the second is faster.
        cpu_ratio: the same in process CPU time.
        rounds: how many rounds were measured.
    """

    first: Timing
    second: Timing
    wall_ratio: Spread
    cpu_ratio: Spread
    rounds: int

    @property
    def disturbed(self) -> bool:
        """Whether wall-clock ratios spread too much to say anything, or CPU time lies beyond their spread."""
        within = max(self.wall_ratio.upper / self.wall_ratio.lower, _CLOSE)
        return within > _STEADY or not 1 / within <= self.cpu_ratio.median / self.wall_ratio.median <= within


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two artifacts timed in turn, in two kinds of session.

    Attributes:
        recorded: with the session options each artifact was recorded with.
        plain: with the runtime's own defaults.
        threads: threads an operator may use, in both kinds.
        batch: samples per call.
    """

    recorded: TimedPair
    plain: TimedPair
    threads: int
    batch: int

    def doubts(self) -> list[str]:
        """Say what of the recorded sessions other processes disturbed; CPU time is no measure of several threads."""
        if self.threads != 1 or not self.recorded.disturbed:
            return []
        wall, cpu = self.recorded.wall_ratio, self.recorded.cpu_ratio
        return [
            f"the machine was busy: the speed-up is {wall.median:.2f}x ({wall.lower:.2f}-{wall.upper:.2f}) by the "
            f"clock, {cpu.median:.2f}x ({cpu.lower:.2f}-{cpu.upper:.2f}) by processor time, which counts no "
            "waiting for others; time again with `graphopt bench` on an idle machine"
        ]


def compare(
    baseline: Artifact,
    artifact: Artifact,
    inputs: Sequence[Array] | None = None,
    *,
    batch: int = 1,
    threads: int = 1,
    seconds: float = 2.0,
) -> Comparison:
    """Time two artifacts with the same inputs in turn, on recorded and on plain session options.

    Args:
        baseline: usually the float32 original, lowered by the same backend.
        artifact: what is compared with it; the same is timed alone.
        inputs: realistic inputs, one per artifact input (first axis: samples); made up if None.
        batch: samples per call; where the artifacts do not take so many, as many as they do.
        threads: threads an operator may use.
        seconds: time to spend on each kind of session, at least seven rounds whatever they take.

    Raises:
        UsageError: the artifacts take different inputs.
        LoweringError: the runtime is missing or refuses an artifact.
    """
    described = [[(len(spec.shape), spec.dtype) for spec in one.inputs] for one in (baseline, artifact)]
    if described[0] != described[1]:
        one, other = _told_apart(baseline.path, artifact.path)
        raise UsageError(
            f"{one} takes {', '.join(map(str, baseline.inputs))}; {other} takes "
            f"{', '.join(map(str, artifact.inputs))}. Only artifacts with the same inputs can be timed in turn."
        )
    batch = BatchSizes(artifact.inputs).taken(batch)
    feed = batch_of(artifact.inputs, inputs, batch)

    sides = [baseline] if artifact is baseline else [baseline, artifact]

    def pair(sides: Sequence[Artifact]) -> TimedPair:
        calls = [_bound(one.session(threads=threads), feed) for one in sides]
        return time_in_turn(calls[0], calls[-1], seconds=seconds)

    return Comparison(
        recorded=pair(sides),
        plain=pair([_without_options(one) for one in sides]),
        threads=threads,
        batch=batch,
    )


def time_in_turn(first: Callable[[], object], second: Callable[[], object], *, seconds: float = 2.0) -> TimedPair:
    """Call both in turn for about `seconds` and summarise.

    Args:
        first: what ratios put on top.
        second: what they divide by; where it is `first`, that is called alone.
        seconds: time to spend, after the warm-up.
    """
    calls = [first] if second is first else [first, second]
    wall, cpu = in_turn(calls, seconds=seconds)
    times = [Timing(*map(Spread.of, both)) for both in zip(wall, cpu, strict=True)]
    return TimedPair(times[0], times[-1], ratios(wall[0], wall[-1]), ratios(cpu[0], cpu[-1]), len(wall[0]))


def in_turn(calls: Sequence[Callable[[], object]], *, seconds: float) -> tuple[list[list[float]], list[list[float]]]:
    """Call all in turn for about `seconds`, and seven rounds at least.

    Returns:
        The milliseconds that a call of each takes, a value a round: wall-clock, and process CPU time.
    """
    repeats = [_burst(call) for call in calls]
    wall: list[list[float]] = [[] for _ in calls]
    cpu: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < _FEWEST_ROUNDS or (rounds < _MOST_ROUNDS and time.perf_counter() < end):
        for index in range(len(calls)) if rounds % 2 == 0 else reversed(range(len(calls))):
            waited, worked = _time(calls[index], repeats[index])
            wall[index].append(waited)
            cpu[index].append(worked)
        rounds += 1
    return wall, cpu


def ratios(first: Sequence[float], second: Sequence[float]) -> Spread:
    """Return how the times of rounds lie, each over the second's of the same round."""
    return Spread.of([one / max(other, 1e-9) for one, other in zip(first, second, strict=True)])


def batch_of(specs: Sequence[TensorSpec], inputs: Sequence[Array] | None, batch: int) -> tuple[Array, ...]:
    """Return inputs of `batch` samples, or as many as are taken, cycling through those given.

    Without `inputs`, such as nearly any model takes, always the same; dynamic axes other than the first have size
    `batch` too, or the nearest that they may have.
    """
    sizes = BatchSizes(specs)
    near = [[spec.range_of(axis).nearest(batch) for axis in range(len(spec.shape))] for spec in specs]
    shapes = [sizes.shape(spec, batch, other) for spec, other in zip(specs, near, strict=True)]
    if inputs is not None:
        return tuple(
            np.take(array, range(shape[0]), axis=0, mode="wrap") if spec.batched else array
            for shape, spec, array in zip(shapes, specs, inputs, strict=True)
        )
    generator = torch.Generator().manual_seed(0)
    return tuple(drawn(shape, spec.dtype, generator).numpy() for shape, spec in zip(shapes, specs, strict=True))


def _told_apart(one: Path, other: Path) -> tuple[Path, Path]:
    """Return the names of two files, with as much of their folders as tells them apart."""
    ends = (Path(*path.parts[-depth:]) for depth in range(1, len(one.parts) + 1) for path in (one, other))
    pairs = zip(ends, ends, strict=True)
    return next((pair for pair in pairs if pair[0] != pair[1]), (one, other))


def _bound(session: Session, feed: tuple[Array, ...]) -> Callable[[], object]:
    return lambda: session(*feed)


def _without_options(artifact: Artifact) -> Artifact:
    return dataclasses.replace(artifact, session_options={})


def _burst(call: Callable[[], object]) -> int:
    """Warm up; return how many calls make a burst long enough to time."""
    shortest = min(_time(call, 1)[0] for _ in range(_WARM_UP + 1))  # one alone may have waited for another process
    return max(1, round(_SHORTEST_BURST * 1000 / max(shortest, 1e-6)))


def _time(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Return milliseconds per call: wall-clock and process CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        call()
    waited, worked = time.perf_counter() - wall, time.process_time() - cpu
    return waited * 1000 / repeats, worked * 1000 / repeats
