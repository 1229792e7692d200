"""Criteria that look at weights alone.

Each is worked out for every weight that produces or consumes the axis, and the group's worth is the mean over the
weights (group importance; Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, section 3.3). A weight's
values are divided by their mean first, so that wide and narrow, early and late weights can be ranked against each
other; where a criterion is comparable as it is, they are not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from graphopt.axes.groups import Group, Member
from graphopt.ir.graph import arguments, constant
from graphopt.ir.operators import MULTIPLICATIONS, NORMALISATIONS
from graphopt.passes.pruning.standing import Standing, Worths

OfWeight = Callable[[Standing, Member, int], torch.Tensor]  # of one weight and the id of the axis: (indices left,)
_AT_ONCE = 1024  # rows that distances are taken to at once


def l1(standing: Standing, member: Member, axis: int) -> torch.Tensor:
    """Sum of |w| (Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017)."""
    return standing.by_index(standing.weight(member).abs(), member, axis)


def l2(standing: Standing, member: Member, axis: int) -> torch.Tensor:
    """Root of the sum of w^2 (He et al., "Soft Filter Pruning", IJCAI 2018)."""
    return standing.by_index(standing.weight(member).square(), member, axis).sqrt()


def fpgm(standing: Standing, member: Member, axis: int) -> torch.Tensor:
    """Sum of distances to all other indices: what lies near the geometric median can be replaced by the rest.

    He et al., "Filter Pruning via Geometric Median", CVPR 2019, equation 4.
    """
    rows = standing.rows(member, axis)
    rows = rows - rows.mean(0)  # distances stay, digits are not lost
    squares = rows.square().sum(1)
    distances = torch.zeros_like(squares)
    for start in range(0, len(rows), _AT_ONCE):
        others = torch.arange(start, min(start + _AT_ONCE, len(rows)))
        between = squares[:, None] + squares[None, others] - 2 * rows @ rows[others].T
        between[others, torch.arange(len(others))] = 0
        distances += between.clamp(min=0).sqrt().sum(1)
    return distances


def lamp(standing: Standing, member: Member, axis: int) -> torch.Tensor:
    """Square over the squares of all that is not smaller; comparable between weights as it is.

    Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021, equation 4, for indices.
    """
    squares = standing.by_index(standing.weight(member).square(), member, axis)
    ascending = squares.sort().values
    place = torch.searchsorted(ascending, squares).clamp(max=len(squares) - 1)  # NaN is larger than everything
    not_smaller = ascending.flip(0).cumsum(0).flip(0)[place]
    return torch.where(not_smaller == 0, torch.zeros_like(squares), squares / not_smaller)


def over_weights(of_weight: OfWeight, *, comparable: bool = False) -> Callable[[Standing, Sequence[Group]], Worths]:
    """Make a criterion of groups from one of weights: the mean over the weights that produce or consume the axis.

    Args:
        of_weight: the criterion of one weight.
        comparable: whether its values can be compared between weights; otherwise they are divided by their mean.
    """

    def criterion(standing: Standing, groups: Sequence[Group]) -> Worths:
        found: dict[int, torch.Tensor | str] = {}
        for group in groups:
            members = dict.fromkeys([*group.producers, *group.consumers])
            each = [of_weight(standing, member, group.axis) for member in members]
            found[group.axis] = torch.stack([one if comparable else mean_one(one) for one in each]).mean(0)
        return found

    return criterion


def bn_scale(standing: Standing, groups: Sequence[Group]) -> Worths:
    """Mean |gamma| of the norms, and other per-channel scales, that multiply the axis.

    Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017. A norm makes what it
    scales equally large everywhere, so its scales are ranked against each other as they are.
    """
    known = scales(standing.program.graph_module)
    found: dict[int, torch.Tensor | str] = {}
    for group in groups:
        members = [m for m in group.members if m.parameter in known]
        each = [standing.rows(member, group.axis).abs().mean(1) for member in members]
        found[group.axis] = (
            torch.stack(each).mean(0)
            if each
            else "no norm scales it, which criterion=bn_scale ranks by (prune before fold, or use criterion=l2)"
        )
    return found


def random(standing: Standing, groups: Sequence[Group]) -> Worths:
    """Drawn at random: the control that every criterion has to beat."""
    generator = standing.ctx.generator("prune")
    left = [len(standing.kept.get(group.axis, range(group.size))) for group in groups]
    drawn = [torch.rand(count, generator=generator, dtype=torch.float64) * 2 for count in left]
    return dict(zip((group.axis for group in groups), drawn, strict=True))


def mean_one(values: torch.Tensor) -> torch.Tensor:
    """Divide values by their mean; what is not finite stays so."""
    mean = values.mean()
    return torch.ones_like(values) if mean == 0 else values / mean


def scales(gm: fx.GraphModule) -> set[str]:
    """Return the names of trained tensors of one dimension (others of size 1) that norms or products multiply with."""
    names = set()
    for node in gm.graph.nodes:
        if node.op != "call_function" or not hasattr(node.target, "_schema"):
            continue
        given = arguments(node, ())
        if node in NORMALISATIONS:
            factors = [given.get("weight")]
        else:
            factors = [given["self"], given["other"]] if node in MULTIPLICATIONS else []
        for factor in factors:
            tensor = constant(factor, gm)
            if factor is None or not isinstance(tensor, torch.nn.Parameter):
                continue
            if tensor.numel() == max(tensor.shape, default=0):
                names.add(str(factor.target))
    return names
