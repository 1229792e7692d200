"""Adversarial views: inputs moved a little to where the student errs most; teachers see them, too.

    x + e * sign(d loss / d x)

Goodfellow et al. 2015, "Explaining and Harnessing Adversarial Examples", section 4 (the fast gradient sign method).
"""

from __future__ import annotations

import torch

from graphopt.data.batches import Batch
from graphopt.distillation.augment import View
from graphopt.distillation.teaching import Teaching
from graphopt.errors import UsageError
from graphopt.ir.buffers import with_its_buffers
from graphopt.ir.program import Program

ADVERSARIAL = "adversarial"

_REACH = 0.1  # of the standard deviation of the inputs


def adversarial(view: View, student: Program, lesson: Teaching) -> View:
    """Return a view that moves the first input, as another view has it, against the student.

    The student runs on the whole batch once more, in the mode that it is in; statistics of BatchNorm stay as they are.

    Raises:
        UsageError: when it is called, and the loss has no gradient in that input.
    """

    def moved(batch: Batch, generator: torch.Generator) -> Batch:
        first, *others = view(batch, generator)
        first = first.detach().requires_grad_()
        batch = (first, *others)
        with torch.enable_grad(), with_its_buffers(student.graph_module):
            outputs = student.call_flat(batch[: len(student.inputs)])
            loss = lesson.loss(outputs, lesson.wanted(batch), batch)
            (slope,) = torch.autograd.grad(loss, first, allow_unused=True)
        if slope is None:
            raise UsageError(
                f'The plan says augment = "{ADVERSARIAL}", and nothing that is learned depends on the first input, '
                f"{student.inputs[0]}, but by way of integers. Say augment = []."
            )
        return (first.detach() + _REACH * first.detach().std() * slope.sign(), *others)

    return moved
