"""Samples out of a teacher: inputs whose statistics at every BatchNorm are those that it was trained on.

    minimise over x    mean over BatchNorms of ((mean(x) - mean) / deviation)^2 + (variance(x) / variance - 1)^2
                       + cross-entropy of the teacher's output against classes in equal numbers

DeepInversion: Yin et al. 2020, "Dreaming to Distill", equations 1 to 4, with statistics relative to their size and
without the prior of natural images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx
from torch.nn.functional import cross_entropy

from graphopt.distillation.addresses import Tap
from graphopt.distillation.objective import Target, targets_of
from graphopt.distillation.readings import Reading, opened
from graphopt.distillation.statistics import batch_norms
from graphopt.distillation.taps import own_outputs
from graphopt.errors import UsageError
from graphopt.ir.graph import arguments
from graphopt.ir.program import Program
from graphopt.pipeline.context import Progress

_BATCH = 128  # samples that have their statistics together
_STEPS = 200
_RATE = 0.2  # of Adam, for inputs that start with a deviation of 1
_CLASSES = 0.1  # weight of the cross-entropy


def synthesised(teacher: Program, count: int, generator: torch.Generator, progress: Progress) -> torch.Tensor:
    """Make up inputs of a teacher.

    Args:
        teacher: in evaluation mode; one floating input, of sizes that are known but for the batch.
        count: how many.
        generator: draws what they start from.
        progress: shows the steps.

    Raises:
        UsageError: the teacher has no BatchNorm with running statistics, or other inputs.
    """
    norms = batch_norms(teacher)
    sizes = [size for size in teacher.inputs[0].shape[1:] if isinstance(size, int)]
    if not norms:
        raise UsageError("Samples are made up of the statistics of BatchNorms, and the teacher has none. Give data.")
    plain = len(teacher.inputs) == 1 and teacher.inputs[0].dtype.is_floating_point
    if not plain or len(sizes) + 1 < len(teacher.inputs[0].shape):
        raise UsageError(
            f"Samples are made up of teachers with one floating input of known sizes, and this one takes "
            f"{', '.join(map(str, teacher.inputs))}. Give data."
        )
    read = opened(teacher, [Reading(Tap(node.name, _input(node).name), "values") for node in norms])
    wanted = [_statistics(node, teacher) for node in norms]
    logits = next((target for target in targets_of(teacher)[0] if target.kind == "logits"), None)
    shapes = [(min(_BATCH, count - start), *sizes) for start in range(0, count, _BATCH)]
    found = [torch.randn(shape, generator=generator).to(teacher.device).requires_grad_() for shape in shapes]
    optimizers = [torch.optim.Adam([batch], _RATE) for batch in found]
    for step in progress.track(range(_STEPS * len(found)), "distill: samples"):
        at = step % len(found)
        optimizers[at].zero_grad()
        batch = found[at]
        batch.grad = torch.autograd.grad(_mismatch(read, batch, wanted, logits), batch)[0]
        optimizers[at].step()
    return torch.cat([batch.detach() for batch in found])


def _mismatch(
    read: Program, batch: torch.Tensor, wanted: Sequence[tuple[torch.Tensor, torch.Tensor]], logits: Target | None
) -> torch.Tensor:
    """Return how far the statistics of a batch are off, and how far its samples are from classes in equal numbers."""
    outputs = read.call_flat((batch,))
    own = len(own_outputs(read))
    loss = torch.zeros((), device=batch.device)
    for value, (mean, variance) in zip(outputs[own:], wanted, strict=True):
        axes = [axis for axis in range(value.dim()) if axis != 1]
        has_variance, has_mean = torch.var_mean(value, axes, correction=0)
        apart = (has_mean - mean).square() / variance + (has_variance / variance - 1).square()
        loss = loss + apart.mean() / len(wanted)
    if logits is not None:
        rows = outputs[logits.index].movedim(logits.axis, -1).flatten(0, -2)
        classes = torch.arange(len(rows), device=batch.device) % rows.shape[-1]
        loss = loss + _CLASSES * cross_entropy(rows, classes)
    return loss


def _statistics(node: fx.Node, program: Program) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean and the variance that a BatchNorm keeps, the latter with its epsilon."""
    stored = program.state_dict()
    mean, variance = (stored[str(source.target)] for source in node.args[3:5] if isinstance(source, fx.Node))
    return mean, variance + arguments(node, ("eps",))["eps"]


def _input(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source
