"""What each residual branch contributes: to the program's outputs, or to the stream it is added to.

output       relative squared error of the outputs without the branch, one run of the program for each branch
influence    1 - cos(x, x + f(x)), one run for all (block influence of ShortGPT, Men et al. 2024, arXiv:2403.03853,
             section 3.2; there per token, here per sample, which is the same for any layout of the tokens)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import fx

from graphopt.data.batches import Batch, batch_count
from graphopt.errors import DataError
from graphopt.ir.program import Program
from graphopt.ir.walker import Walker
from graphopt.measure.equivalence import OutputError, not_finite
from graphopt.passes.residuals.branches import Branch
from graphopt.passes.residuals.removal import without
from graphopt.pipeline.context import Progress

Criterion = Literal["output", "influence", "random", "last"]


def output_errors(
    program: Program, branches: Sequence[Branch], error: OutputError, progress: Progress, by: str
) -> list[float]:
    """Return for each branch the error of `program` without it, in order."""
    tracked = progress.track(branches, "measuring branches", len(branches))
    return [error.of(without(program, [branch.result.name], by).call_flat) for branch in tracked]


def influences(program: Program, branches: Sequence[Branch], batches: Sequence[Batch]) -> list[float]:
    """Return for each branch how far its sum turns away from its shortcut, mean over samples, 0 to 2."""
    wanted: dict[fx.Node, list[int]] = {}
    for index, branch in enumerate(branches):
        wanted.setdefault(branch.sum, []).append(index)
    totals = [0.0] * len(branches)
    walker = Walker(program)
    for batch in batches:
        walker.start([batch])
        for node in program.graph.nodes:
            here = wanted.get(node, [])
            shortcuts = [walker.values[branches[index].stays][0] for index in here]
            walker.step()
            for index, shortcut in zip(here, shortcuts, strict=True):
                totals[index] += _turned(shortcut, walker.values[node][0], batch_count(batch))
    samples = sum(batch_count(batch) for batch in batches)
    return [
        _known(total / samples, f"what `{branch.name}` is added to")
        for branch, total in zip(branches, totals, strict=True)
    ]


def _turned(before: torch.Tensor, after: torch.Tensor, samples: int) -> float:
    """Return the sum over samples of 1 - cos."""
    rows = samples if before.shape[0] == samples else 1
    one, other = (value.detach().double().reshape(rows, -1) for value in (before, after))
    cosine = torch.nn.functional.cosine_similarity(one, other, dim=1)
    return float((1 - cosine).sum()) * samples / rows


def _known(score: float, what: str) -> float:
    if math.isnan(score):
        raise DataError(not_finite(what))
    return score
