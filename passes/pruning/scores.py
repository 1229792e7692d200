"""How much an index of a group is worth: one number per index, comparable between groups.

For a norm of order p, a member weight w (a dimension that carries the axis, the others summed over) gives

    s_i = (sum over the rest of |w_i|^p)^(1/p),   normalised to mean 1,

and a group's score is the mean over the weights that produce or consume its axis (group magnitude; Fang et al.,
"DepGraph", CVPR 2023, section 3.3). The normalisation makes wide and narrow, early and late weights comparable.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import fx

from graphopt.axes.groups import Group, Member, coordinates
from graphopt.graph import tensor_attribute

Criterion = Literal["l1", "l2", "random"]
_ORDER = {"l1": 1, "l2": 2}


def score(gm: fx.GraphModule, group: Group, criterion: Criterion, generator: torch.Generator) -> torch.Tensor:
    """Return the worth of each index, shape (group.size,), float64, mean about 1.

    Args:
        gm: where the weights are.
        group: whose indices to score.
        criterion: "l1" or "l2" norm of the weights, or "random" as a control.
        generator: for the random criterion.
    """
    if criterion == "random":
        return torch.rand(group.size, generator=generator, dtype=torch.float64) * 2
    members = dict.fromkeys([*group.producers, *group.consumers])
    norms = [_norm(tensor_attribute(gm, member.parameter), member, group, _ORDER[criterion]) for member in members]
    return torch.stack([_mean_one(norm) for norm in norms]).mean(0)


def _norm(weight: torch.Tensor, member: Member, group: Group, order: int) -> torch.Tensor:
    """Return the p-norm of what each index of the axis owns in one weight, shape (group.size,)."""
    powers = weight.detach().double().abs().pow(order)
    others = [dim for dim in range(weight.dim()) if dim != member.dim]
    along = powers.sum(others) if others else powers  # (size of the dimension,)
    total = torch.zeros(group.size, dtype=torch.float64)
    for positions in coordinates(member.layout, group.axis):
        index = torch.tensor(positions)
        carried = index >= 0  # a concatenation carries other axes beside
        total.index_add_(0, index[carried], along[carried])
    return total.pow(1 / order)


def _mean_one(values: torch.Tensor) -> torch.Tensor:
    mean = values.mean()
    return values / mean if mean > 0 else torch.ones_like(values)
