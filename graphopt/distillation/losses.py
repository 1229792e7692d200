"""Losses between what a student computes and what its teacher does. Pure functions, no labels.

Each returns a scalar that is 0 when both agree and does not depend on the batch size or, but for `soft_labels`, on
the scale of the values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn.functional import kl_div, log_softmax, normalize

TapLoss = Literal["values", "attention", "similarity"]

_TINY = 1e-12  # keeps the ratio defined where a teacher's value is all zero


def soft_labels(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return T^2 KL(teacher || student) over the last axis (classes), mean over everything else.

    Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", section 2. Both arguments are
    logits, or log-probabilities, of one shape.
    """
    wanted = log_softmax(teacher.float() / temperature, -1)
    found = log_softmax(student.float() / temperature, -1)
    return temperature**2 * kl_div(found, wanted, reduction="none", log_target=True).sum(-1).mean()


def relative_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the squared error over the teacher's squared magnitude, both summed over the batch.

    The hint loss of FitNets (Romero et al. 2015, equation 3) made free of scale. Entries where the teacher is not
    finite (masked scores) are left out.
    """
    usable = torch.isfinite(teacher)
    wanted = torch.where(usable, teacher, 0.0).float()
    error = torch.where(usable, student, 0.0).float() - wanted
    return error.square().sum() / wanted.square().sum().clamp_min(_TINY)


def attention(student: torch.Tensor, teacher: torch.Tensor, axis: int) -> torch.Tensor:
    """Compare where two values are large, whatever the size of `axis`: their maps of mean squares over it.

    Attention transfer, Zagoruyko and Komodakis 2017, equation 2 with p = 2. Each sample's map has unit norm.
    """
    maps = [normalize(value.float().square().mean(axis).flatten(1), eps=_TINY) for value in (student, teacher)]
    return (maps[0] - maps[1]).square().sum(1).mean()


def similarity(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Compare which samples of the batch two values find alike; everything but the batch axis may differ.

    Similarity-preserving distillation, Tung and Mori 2019, equations 1 to 4.
    """
    rows = [value.float().flatten(1) for value in (student, teacher)]
    grams = [normalize(row @ row.T, dim=1, eps=_TINY) for row in rows]
    return (grams[0] - grams[1]).square().sum(1).mean()


def tap_loss_for(student: Sequence[object], teacher: Sequence[object]) -> tuple[TapLoss, int]:
    """Choose the loss that two values of these sizes (first axis: the batch) allow, and the axis it needs.

    Equal shapes are compared value by value. Where one axis differs, as the width does after pruning, and others
    are left to compare, attention maps over it; anything else by the similarity of samples.
    """
    if list(student) == list(teacher):
        return "values", 0
    if len(student) == len(teacher) > 2 and student[0] == teacher[0]:
        different = [axis for axis in range(1, len(student)) if student[axis] != teacher[axis]]
        if len(different) == 1:
            return "attention", different[0]
    return "similarity", 0


def tap_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Compare a pair of taps by the loss that their shapes allow."""
    kind, axis = tap_loss_for(tuple(student.shape), tuple(teacher.shape))
    if kind == "values":
        return relative_error(student, teacher)
    return attention(student, teacher, axis) if kind == "attention" else similarity(student, teacher)
