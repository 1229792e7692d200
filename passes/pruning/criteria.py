"""The table of criteria, and ranking by one of them.

    l1, l2, fpgm, lamp          of weights                  `weight_criteria`
    bn_scale                    of norms                    `weight_criteria`
    activation, taylor, obd     of samples                  `data_criteria`
    random                      a control                   `weight_criteria`

A criterion takes where the pruning stands and the groups, and returns what each group's indices are worth, comparable
between groups, or why they cannot be told apart. Adding one is a function and a row here (and its name among the
options).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from graphopt.axes.groups import Group
from graphopt.passes.pruning.data_criteria import activation, obd, taylor
from graphopt.passes.pruning.options import Criterion
from graphopt.passes.pruning.standing import Standing, Worths
from graphopt.passes.pruning.weight_criteria import bn_scale, fpgm, l1, l2, lamp, over_weights, random

CRITERIA: Mapping[Criterion, Callable[[Standing, Sequence[Group]], Worths]] = {
    "l1": over_weights(l1),
    "l2": over_weights(l2),
    "fpgm": over_weights(fpgm),
    "lamp": over_weights(lamp, comparable=True),
    "bn_scale": bn_scale,
    "activation": activation,
    "taylor": taylor,
    "obd": obd,
    "random": random,
}


def rank(
    criterion: Criterion, standing: Standing, groups: Sequence[Group]
) -> tuple[dict[int, torch.Tensor], dict[int, str]]:
    """Score the indices of every group.

    Args:
        criterion: which of the table.
        standing: where the pruning stands.
        groups: what to score.

    Returns:
        By axis the worth of each index, (size,), float64, -inf for those that have gone; and for groups whose indices
        cannot be told apart the reason.

    Raises:
        DataError: the criterion needs data and there is none.
    """
    scores: dict[int, torch.Tensor] = {}
    reasons: dict[int, str] = {}
    worths = CRITERIA[criterion](standing, groups) if groups else {}
    for group in groups:
        worth = worths[group.axis]
        if isinstance(worth, str):
            reasons[group.axis] = worth
        elif not bool(torch.isfinite(worth).all()):
            reasons[group.axis] = f"its {criterion} is not finite"
        else:
            whole = torch.full((group.size,), -torch.inf, dtype=torch.float64)
            whole[list(standing.kept.get(group.axis, range(group.size)))] = worth.cpu()
            scores[group.axis] = whole
    return scores, reasons
