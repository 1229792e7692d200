"""From programs to artifacts: lower, reload, verify, compare with the original, time in turn with it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from graphopt.data.batches import Batch
from graphopt.ir.program import Program
from graphopt.ir.torch_internals import output_structure, pytree
from graphopt.job.recorder import Metric
from graphopt.job.report import Latency, Report, Row
from graphopt.measure.bench import Comparison, Spread, Timing, compare
from graphopt.measure.equivalence import Probe
from graphopt.targets.backend import Artifact, Backend, Session


def deliver(
    item: Backend,
    program: Program,
    original: Program,
    home: Path,
    report: Report,
    *,
    probe: Probe,
    metric: Metric | None,
    bench: bool,
) -> Artifact:
    """Lower `program` and add its row to the report; the original's row gains its size and latency.

    Raises:
        LoweringError: the backend cannot lower it, or the artifact computes something else.
    """
    started = time.perf_counter()
    artifact = item.lower(program, item.path_in(home))
    item.verify(artifact, program, tuple(tensor.numpy() for tensor in probe.batch))
    seconds = time.perf_counter() - started
    baseline = item.lower(original, item.path_in(home, f"original.{item.name}"))
    session = artifact.session()
    row = Row(
        artifact.path.name,
        target=item.name,
        cost=report.rows[-1].cost,
        size=artifact.size,
        error=probe.measure(flat(session), shared=True),
        metric=metric(as_model(session, original)) if metric else None,
        seconds=seconds,
        summary=item.summary(artifact),
    )
    before = dataclasses.replace(report.original, size=baseline.size)
    if bench and item.times_here:
        found = compare(baseline, artifact, tuple(tensor.numpy() for tensor in probe.batch))
        row = dataclasses.replace(
            row,
            latency=_latency("recorded", found, found.recorded.second, found.recorded.wall_ratio),
            plain=_latency("plain", found, found.plain.second, found.plain.wall_ratio),
        )
        before = dataclasses.replace(
            before,
            latency=_latency("recorded", found, found.recorded.first),
            plain=_latency("plain", found, found.plain.first),
        )
    report.rows[0] = before
    report.rows.append(row)
    report.facts[item.name] = dict(artifact.facts)
    report.notes += [f"{item.name}: {finding.text}" for finding in item.check(artifact)]
    return artifact


def _latency(options: str, found: Comparison, timing: Timing, ratio: Spread | None = None) -> Latency:
    wall = timing.wall
    return Latency(
        f"{options} options, {found.threads} thread{'s' if found.threads > 1 else ''}",
        found.batch,
        wall.median,
        (wall.lower, wall.upper),
        ratio.median if ratio else None,
        (ratio.lower, ratio.upper) if ratio else None,
    )


def flat(session: Session) -> Callable[[Batch], Batch]:
    """Let a session take and return flat tensors, as `Program.call_flat` does."""

    def call(batch: Batch) -> Batch:
        return tuple(torch.from_numpy(array) for array in session(*(tensor.numpy() for tensor in batch)))

    return call


def as_model(session: Session, program: Program) -> Callable[..., Any]:
    """Let a session be called like the model: same arguments, same output structure."""
    structure = output_structure(program.graph_module)
    call = flat(session)

    def model(*args: Any, **kwargs: Any) -> Any:
        ordered = {name: kwargs[name] for name in program.example_kwargs if name in kwargs}
        leaves = pytree.tree_leaves((args, {**ordered, **kwargs}))
        outputs = call(tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor)))
        return pytree.tree_unflatten(list(outputs), structure) if len(outputs) == structure.num_leaves else outputs

    return model
