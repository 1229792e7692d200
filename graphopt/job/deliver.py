"""From programs to artifacts: lower, reload, verify, compare with the original, time in turn with it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from graphopt.files import ScratchDirectory
from graphopt.ir.contents import as_array
from graphopt.ir.memory import give_back
from graphopt.ir.program import Program
from graphopt.job.recorder import Score
from graphopt.job.report import Latency, Row
from graphopt.measure.bench import Comparison, Spread, Timing, batch_of, compare
from graphopt.measure.cost import cost
from graphopt.measure.equivalence import Probe
from graphopt.measure.evaluate import as_model
from graphopt.measure.left_float import left_float, time_in_float
from graphopt.quantization.stored import is_quantized
from graphopt.targets.backend import Artifact, Backend
from graphopt.targets.flat_session import flat

_SMALLER = 0.99  # of the bytes: a quantized artifact that saves less than a percent saves nothing to speak of


@dataclass(frozen=True)
class Delivery:
    """An artifact and what was found out about it.

    Attributes:
        artifact: the lowered program.
        row: the artifact's row in the report.
        baseline: the row of the original, timed in turn with the artifact; None where it was not lowered.
        notes: what a user should know.
    """

    artifact: Artifact
    row: Row
    baseline: Row | None
    notes: tuple[str, ...]

    def kept_by(self, home: ScratchDirectory) -> Delivery:
        """Let the artifact keep the directory alive that its files are in."""
        return dataclasses.replace(self, artifact=dataclasses.replace(self.artifact, home=home))


class Originals:
    """The original as it is lowered for each target, which artifacts are compared with: lowered once for all it can."""

    def __init__(self, program: Program, backends: Sequence[Backend], folder: Path) -> None:
        """Prepare to lower `program` for any of `backends` into `folder`."""
        self.program = program
        self._timed = {item.suffix: item for item in reversed(backends) if item.times_here}
        self._folder = folder
        self._known: dict[str, Artifact] = {}

    def lowered_for(self, item: Backend) -> Artifact:
        """Return the original to compare an artifact of `item` with, in bytes and where `item` times here in time.

        Raises:
            LoweringError: the backend cannot lower it.
        """
        lowers = item if item.times_here else self._timed.get(item.suffix, item)
        if lowers.name not in self._known:
            path = lowers.path_in(self._folder, f"original.{lowers.name}")
            self._known[lowers.name] = lowers.lower(self.program, path)
        return self._known[lowers.name]


def deliver(
    item: Backend,
    program: Program,
    originals: Originals,
    home: Path,
    *,
    probe: Probe,
    metric: Score | None,
    bench: bool,
    sizes: bool,
) -> Delivery:
    """Lower `program` into the directory `home`, and compare with the original what is asked for: time or bytes.

    Raises:
        LoweringError: the backend cannot lower it, or the artifact computes something else.
    """
    started = time.perf_counter()
    artifact = item.lower(program, item.path_in(home))  # which says what types the runtime lacks
    inputs = tuple(map(as_array, probe.batch))
    session = artifact.session()
    item.verify(artifact, program, inputs, session)
    seconds = time.perf_counter() - started
    original = originals.program
    give_back(original.parameters())  # what dequantized weights took, say
    row = Row(
        artifact.path.name,
        target=item.name,
        cost=cost(program),
        size=artifact.size,
        error=probe.measure(flat(session), declared=program.outputs),
        metric=metric(as_model(flat(session), original)) if metric else None,
        seconds=seconds,
        summary=item.summary(artifact),
    )
    del session  # every session holds the weights once more
    baseline = None
    doubts: list[str] = []
    in_float = left_float(program)
    if bench or sizes:
        plain = artifact if program is original else originals.lowered_for(item)
        baseline = Row("original", target=item.name, cost=cost(original), size=plain.size)
        if bench and item.times_here:
            found = compare(plain, artifact, inputs)
            row = _timed(row, found, "second")
            baseline = _timed(baseline, found, "first")
            doubts = found.doubts()
            if is_quantized(program):
                times = item.operator_times(artifact, batch_of(artifact.inputs, inputs, 1))
                in_float.extend(time_in_float(times))
    said = [*doubts, *(finding.text for finding in item.check(artifact))]
    said += [*in_float, *item.advice(artifact), *_what_does_not_pay(row, baseline, is_quantized(program))]
    return Delivery(artifact, row, baseline, tuple(f"{item.name}: {text}" for text in said))


def _what_does_not_pay(row: Row, baseline: Row | None, quantized: bool) -> list[str]:
    """Say where an artifact is slower or larger than the original, or quantized and no smaller."""
    said = []
    spread = row.latency.speedup_spread if row.latency is not None else None
    if spread is not None and spread[1] < 1:
        said.append(f"the artifact is slower than the original ({spread[0]:.2f}-{spread[1]:.2f}x)")
    share = row.size / baseline.size if row.size and baseline is not None and baseline.size else 0.0
    if share > 1:
        said.append(f"the artifact is larger than the original ({share:.2f}x)")
    elif quantized and share > _SMALLER:
        said.append(f"the artifact is quantized and hardly smaller than the original ({share:.1%} of its bytes)")
    advice = "leave out passes from the last on, or let them leave layers as they are (options such as skip)"
    return [f"{text}; {advice}" for text in said]


def _timed(row: Row, found: Comparison, side: str) -> Row:
    """Add the latencies of one side of a comparison; the second also gets its speed-up over the first."""
    kinds = {"recorded": found.recorded, "plain": found.plain}
    # Of processor time: one thread computes, and by the clock a gate is decided by what else the machine does (0.37x
    # for 1.94x was seen). On an idle machine both are the same.
    ratios = {name: pair.cpu_ratio if side == "second" else None for name, pair in kinds.items()}
    timed = {name: _latency(name, found, getattr(pair, side), ratios[name]) for name, pair in kinds.items()}
    return dataclasses.replace(row, latency=timed["recorded"], plain=timed["plain"])


def _latency(options: str, found: Comparison, timing: Timing, ratio: Spread | None = None) -> Latency:
    wall = timing.wall
    varies = ratio is not None and ratio.minimum < ratio.maximum  # not where nothing was rewritten
    return Latency(
        f"{options} options, {found.threads} thread{'s' if found.threads > 1 else ''}",
        found.batch,
        wall.median,
        (wall.lower, wall.upper),
        ratio.median if ratio else None,
        (ratio.lower, ratio.upper) if ratio and varies else None,
    )
