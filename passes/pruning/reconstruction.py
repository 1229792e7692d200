"""What calibration data makes of a program that lost channels: the tensors with which it is nearest the original.

Compensated weights, or those and re-estimated BatchNorm statistics, or neither: what is kept is what brings the
outputs nearest those of the original, on samples that nothing was fitted to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from graphopt.axes.infer import Axes
from graphopt.data.batches import Batch, SampleSource, whole_batches
from graphopt.data.split import FEWEST
from graphopt.distillation.statistics import batch_norms, estimate_statistics
from graphopt.errors import VerifyError
from graphopt.ir.editor import Editor
from graphopt.ir.finite import all_finite
from graphopt.ir.graph import tensor_attribute
from graphopt.ir.program import Program
from graphopt.measure.equivalence import Probe
from graphopt.passes.pruning.compensation import Compensation, compensate
from graphopt.passes.pruning.references import usable
from graphopt.pipeline.context import Context
from graphopt.pipeline.plan import Refusal
from graphopt.statistics.memory import peak_bytes_per_sample

MEMORY = 2 << 30  # bytes of activations of both programs held at once
_BATCH = 64  # samples run at once
_JUDGED = 128  # samples whose outputs are compared
_TOO_FEW = Refusal(
    "compensation",
    f"not compensated: too few samples, at least {FEWEST} are needed to fit some and judge by others",
    "not compensated: too few samples",
)


def reconstruct(
    original: Program,
    prune: Callable[[], Program],
    axes: Axes,
    kept: Mapping[int, Sequence[int]],
    ctx: Context,
    limit: int,
    made_by: str,
) -> tuple[Compensation, dict[str, float]]:
    """Find the tensors that a pruned program should have, from at most `limit` samples.

    Args:
        original: the program before the removal.
        prune: makes the program after it, if it is looked at: the new tensors take the place of its own.
        axes: of `original`.
        kept: the indices each axis keeps.
        ctx: whose samples are run, at least one batch of them.
        limit: samples used at most; fewer where they would not fit in `MEMORY`.
        made_by: the pass.

    Raises:
        DataError: a sample holds NaN, or makes an output of `original` NaN.

    Returns:
        New tensors with what was left alone, and by name of what was tried the signal-to-noise ratio of the outputs
        in dB.
    """
    samples = ctx.need_samples("prune", "to make up for what is removed")
    if ctx.held_out is None:
        return Compensation(refusals=[_TOO_FEW]), {}
    batches, left_out = usable(original, samples, _batches(original, samples, limit))
    judges, unjudged = usable(original, ctx.held_out, _batches(original, ctx.held_out, _JUDGED))
    left_out += unjudged
    if not batches or not judges:
        return Compensation(refusals=[*left_out, _TOO_FEW]), {}
    pruned = prune()
    probes = [Probe(original, batch) for batch in judges]

    def nearness(candidate: Program) -> float:
        return min(_nearness(probe, candidate) for probe in probes)

    quality = {"plain": nearness(pruned)}  # before its tensors go, one by one
    found = compensate(original, pruned, axes, kept, batches, ctx)
    found.refusals[:0] = left_out
    candidates = {"plain": {}, "compensated": found.tensors}
    quality["compensated"] = nearness(pruned)
    if batch_norms(pruned):
        statistics = estimate_statistics(pruned, batches)
        if all(map(all_finite, statistics.values())):
            name = "compensated, statistics re-estimated"
            candidates[name] = {**found.tensors, **statistics}
            quality[name] = nearness(with_tensors(pruned, statistics, made_by))
        else:
            found.refusals.append(Refusal("statistics", "not re-estimated: they are not finite on the samples"))
    best = max(quality, key=quality.__getitem__)  # of equals the first, which is plain
    if best == "plain":
        comparable = quality[best] > -math.inf
        reason = "the outputs are nearest the original's without" if comparable else "the outputs cannot be compared"
        found.refusals.append(Refusal("compensation", f"not compensated: {reason}"))
        found.layers.clear()
    found.tensors = dict(candidates[best])
    return found, {name: ratio for name, ratio in quality.items() if ratio > -math.inf}


def _nearness(probe: Probe, candidate: Program) -> float:
    """Return the signal-to-noise ratio of the outputs in dB, -inf where there is none."""
    try:
        ratio = probe.measure(candidate.call_flat).sqnr
    except VerifyError:  # not finite where the original is
        return -math.inf
    return -math.inf if math.isnan(ratio) else ratio


def with_tensors(program: Program, tensors: Mapping[str, torch.Tensor], made_by: str) -> Program:
    """Return a copy of `program` in which some parameters and buffers hold other values."""
    program = program.copy()
    editor = Editor(program.graph_module, made_by)
    for name, tensor in tensors.items():
        old = tensor_attribute(program.graph_module, name)
        editor.put(name, tensor.to(old.device), kind_of=old)
    return program.with_graph(editor.finish())


def _batches(program: Program, samples: SampleSource, limit: int) -> list[Batch]:
    """Read the samples that fit in memory, in batches the program takes."""
    fits = MEMORY // max(1, 2 * peak_bytes_per_sample(program))
    limit = min(limit, max(FEWEST, fits))
    return list(whole_batches(samples, _BATCH, limit, takes=program.takes))
