"""Losses between what a student computes and what its teacher does. Pure functions, no labels.

Each returns a scalar that is 0 when both agree (but for `gumbel_labels`) and is a mean: over samples, their pairs or
triples, places and heads, of what is summed over classes, channels or keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn.functional import kl_div, log_softmax, normalize, smooth_l1_loss

TapLoss = Literal["values", "attention", "similarity"]

_TINY = 1e-12  # keeps the ratio defined where a teacher's value is all zero
_LEAST_SPREAD = 1e-8  # of probabilities that are told from constant ones


def soft_labels(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return T^2 KL(teacher || student) over the last axis (classes), mean over everything else.

    Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", section 2. Both arguments are
    logits, or log-probabilities, of one shape.
    """
    wanted = log_softmax(_wide(teacher) / temperature, -1)
    found = log_softmax(_wide(student) / temperature, -1)
    return temperature**2 * kl_div(found, wanted, reduction="none", log_target=True).sum(-1).mean()


def gumbel_labels(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Return `soft_labels` towards one draw of the teacher's class: its logits with Gumbel noise.

    Jang, Gu, Poole 2017, "Categorical Reparameterization with Gumbel-Softmax", equation 2: the draws of a low
    temperature are classes in the teacher's own proportions, those of a high one are near its soft labels. The student
    gets no noise.

    Args:
        student: logits.
        teacher: logits of the same shape.
        temperature: of both.
        generator: draws the noise.
    """
    drawn = torch.rand(teacher.shape, generator=generator, dtype=torch.float64).clamp_min(
        torch.finfo(torch.float64).tiny
    )
    noise = -(-drawn.log()).log()
    return soft_labels(student, _wide(teacher) + noise.to(teacher.device, torch.float32), temperature)


def dist(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return T^2 times how little classes correlate within samples, plus how little samples do within classes.

    DIST: Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher", equations 6 to 9, with both weights 1;
    the mean over samples, and over classes, of one minus Pearson's correlation of the probabilities. Rows of any number
    of leading axes are samples.
    """
    rows = [(_wide(logits) / temperature).softmax(-1).flatten(0, -2) for logits in (student, teacher)]
    inter = 1 - _correlation(rows[0], rows[1])
    intra = 1 - _correlation(rows[0].T, rows[1].T)
    return temperature**2 * (inter.mean() + intra.mean())


def relative_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the squared error over the teacher's squared magnitude, both summed over the batch.

    The hint loss of FitNets (Romero et al. 2015, equation 3) made free of scale. Entries where the teacher is not
    finite (masked scores) are left out.
    """
    usable = torch.isfinite(teacher)
    wanted = _wide(torch.where(usable, teacher, 0.0))
    error = _wide(torch.where(usable, student, 0.0)) - wanted
    return error.square().sum() / wanted.square().sum().clamp_min(_TINY)


def cosine(student: torch.Tensor, teacher: torch.Tensor, axis: int) -> torch.Tensor:
    """Return one minus the cosine along an axis (channels), mean over everything else."""
    found, wanted = (normalize(_wide(value), dim=axis, eps=_TINY) for value in (student, teacher))
    return 1 - (found * wanted).sum(axis).mean()


def attention(student: torch.Tensor, teacher: torch.Tensor, axis: int) -> torch.Tensor:
    """Compare where two values are large, whatever the size of `axis`: their maps of mean squares over it.

    Attention transfer, Zagoruyko and Komodakis 2017, equation 2 with p = 2. Each sample's map has unit norm.
    """
    maps = [normalize(_wide(value).square().mean(axis).flatten(1), eps=_TINY) for value in (student, teacher)]
    return (maps[0] - maps[1]).square().sum(1).mean()


def similarity(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Compare which samples of the batch two values find alike; everything but the batch axis may differ.

    Similarity-preserving distillation, Tung and Mori 2019, equations 1 to 4.
    """
    rows = [_wide(value).flatten(1) for value in (student, teacher)]
    grams = [normalize(row @ row.T, dim=1, eps=_TINY) for row in rows]
    return (grams[0] - grams[1]).square().sum(1).mean()


def distances(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Compare how far samples of the batch lie apart, over the mean of it: Huber's loss, mean over pairs of samples.

    RKD-D: Park et al. 2019, "Relational Knowledge Distillation", equations 4 to 6. Everything but the batch axis may
    differ; one sample has no pairs, and the loss is 0.
    """
    apart = []
    for value in (student, teacher):
        rows = _wide(value).flatten(1)
        between = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
        pairs = between[~torch.eye(len(rows), dtype=torch.bool, device=rows.device)]
        apart.append(pairs / pairs.mean().clamp_min(_TINY))
    return smooth_l1_loss(apart[0], apart[1]) if apart[0].numel() else (student * 0).sum()


def angles(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Compare the angles between samples of the batch as seen from a third: Huber's loss of cosines, mean over triples.

    RKD-A: Park et al. 2019, equations 7 and 8. Memory grows with the cube of the batch. Fewer than three samples have
    no triples, and the loss is 0.
    """
    count = len(student)
    if count < 3:
        return (student * 0).sum()
    index = torch.arange(count, device=student.device)
    one, corner, other = torch.meshgrid(index, index, index, indexing="ij")
    apart = (one != corner) & (corner != other) & (one != other)
    cosines = []
    for value in (student, teacher):
        rows = _wide(value).flatten(1)
        ways = normalize(rows[:, None] - rows[None], dim=2, eps=_TINY)  # from the second to the first
        cosines.append(torch.einsum("ijd,kjd->ijk", ways, ways)[apart])
    return smooth_l1_loss(cosines[0], cosines[1])


def attention_scores(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of attention scores before their softmax, over what the teacher does not mask.

    TinyBERT: Jiao et al. 2020, equation 7. Both are (batch, heads, queries, keys).
    """
    seen = torch.isfinite(teacher)
    error = _wide(torch.where(seen, student, 0.0)) - _wide(torch.where(seen, teacher, 0.0))
    return error.square().sum() / seen.sum().clamp_min(1)


def attention_probabilities(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher || student) over keys, mean over batch, heads and queries.

    MiniLM: Wang et al. 2020, equation 6. Both are attention after its softmax, (batch, heads, queries, keys).
    """
    found = _wide(student).clamp_min(_TINY).log()
    wanted = _wide(teacher)
    rows: torch.Tensor = torch.special.xlogy(wanted, wanted) - wanted * found
    return rows.sum(-1).mean()


def value_relations(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher || student) of how values attend to each other, mean over batch, heads and tokens.

    MiniLM: Wang et al. 2020, equations 7 and 8. Both are (batch, heads, tokens, head_dim); head_dim may differ.
    """
    found, wanted = (
        log_softmax(_wide(value) @ _wide(value).mT / value.shape[-1] ** 0.5, -1) for value in (student, teacher)
    )
    return kl_div(found, wanted, reduction="none", log_target=True).sum(-1).mean()


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


def _correlation(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return Pearson's correlation of each row; 0 where one of the two is constant."""
    centred = (normalize(rows - rows.mean(1, keepdim=True), dim=1, eps=_LEAST_SPREAD) for rows in (found, wanted))
    return torch.stack([*centred]).prod(0).sum(1)


def _wide(value: torch.Tensor) -> torch.Tensor:
    """Return a value in float32 at least: sums in 16 bits say nothing."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
