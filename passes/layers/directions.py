"""Directions in which outputs react to weights: gradients, of a loss or of outputs summed with random signs.

A trained model's average gradient is zero, which says nothing: whoever asks squares each before averaging. With signs u
drawn for each output, E (dw' J'u)^2 = |J dw|^2, what a change does to the outputs (Hutchinson 1990).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.data.batches import SampleSource, batch_count, whole_labelled_batches
from graphopt.errors import DataError, PassError, foreign_code
from graphopt.ir.graph import tensor_attribute
from graphopt.ir.program import Program
from graphopt.ir.torch_internals import pytree
from graphopt.pipeline.context import Context

# Each gives one draw of the squares averaged, so few and many of them.
_BATCH_OF_GRADIENT = 4


@dataclass(frozen=True, slots=True)
class Purpose:
    """What directions are for: the pass that asks, by which of its settings, and what it can do without any."""

    by: str
    setting: str
    instead: str


def directions(
    program: Program,
    gm: fx.GraphModule,
    names: Sequence[str],
    samples: SampleSource,
    limit: int,
    ctx: Context,
    purpose: Purpose,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield gradients of the loss, or of the outputs along random directions, by name of the tensor, float64.

    Args:
        program: arranges inputs.
        gm: its graph, or one of the same inputs.
        names: tensors of `gm`.
        samples: gradients are taken of a few at once, each of which gives one draw.
        limit: samples at most.
        ctx: gives the loss, and draws.
        purpose: for messages.

    Raises:
        PassError: no gradient reaches the tensors.
        DataError: the loss fails.
    """
    generator = ctx.generator("output directions")
    batches = whole_labelled_batches(samples, _BATCH_OF_GRADIENT, limit, takes=program.takes)
    for batch, labels in ctx.progress.track(batches, "following gradients"):
        weights = _tracked(gm, names)
        args, kwargs = program.unflatten([tensor.clone() for tensor in batch])  # a program may write to its inputs
        with torch.enable_grad():
            output = torch.func.functional_call(gm, weights, args, dict(kwargs), strict=False)
            if ctx.loss is None:
                value = _along_random(output, generator)
            else:
                value = _checked(ctx.loss, output, labels) * batch_count(batch)
        if not value.requires_grad:
            raise PassError(
                f"Pass `{purpose.by}` cannot use {purpose.setting}: no gradient reaches the weights from the outputs"
                f"{'' if ctx.loss is None else ' through the loss'}. Use {purpose.instead}."
            )
        found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
        yield {
            name: torch.zeros_like(weight).double() if gradient is None else gradient.double()
            for (name, weight), gradient in zip(weights.items(), found, strict=True)
        }


def _tracked(gm: fx.GraphModule, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return the weights as tensors that gradients are taken of; names of one tensor share one."""
    tensors = {name: tensor_attribute(gm, name) for name in names}
    own = {id(tensor): tensor.detach().requires_grad_() for tensor in tensors.values()}
    return {name: own[id(tensor)] for name, tensor in tensors.items()}


def _along_random(output: Any, generator: torch.Generator) -> torch.Tensor:
    """Return the outputs summed with random signs."""
    value = torch.zeros(())
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.requires_grad:
            signs = torch.randint(0, 2, leaf.shape, generator=generator).to(leaf) * 2 - 1
            value = value + (leaf * signs).sum().to(value.device, torch.float32)
    return value


def _checked(loss: Callable[[Any, torch.Tensor | None], torch.Tensor], output: Any, labels: Any) -> torch.Tensor:
    given = "no labels, for the data has none" if labels is None else f"labels of shape {tuple(labels.shape)}"
    with foreign_code(
        lambda said, _: DataError(f"The loss failed with {said}. It was called with the model's output and {given}.")
    ):
        value = loss(output, labels)
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise DataError(f"The loss returned {found}; expected a scalar tensor. It was called with {given}.")
    return value.reshape(())
