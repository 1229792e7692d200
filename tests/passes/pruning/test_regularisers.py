"""Regularisers: what they are worth, and that training with them empties whole groups."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from graphopt.capturing.capture import capture
from graphopt.errors import UsageError
from graphopt.ir.graph import tensor_attribute
from graphopt.ir.program import Program
from graphopt.passes.pruning.regularisers import GroupLasso, ScaleL1
from tests import models
from tests.models import example


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight(program: Program, name: str) -> Tensor:
    return tensor_attribute(program.graph_module, name)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def test_group_lasso_is_the_norm_over_all_weights_of_an_index() -> None:
    program = capture(mlp(), (randn(2, 4),))
    first, second = weight(program, "0.weight"), weight(program, "2.weight")
    norms = (first.square().sum(1) + second.square().sum(0)).sqrt()
    torch.testing.assert_close(GroupLasso(program)(), math.sqrt(4 + 2) * norms.sum())


def test_group_lasso_sees_heads_as_wholes() -> None:
    program = capture(models.SplitAttention().double(), (example(models.SplitAttention),))
    penalty = GroupLasso(program, only=["q:heads"])
    before = float(penalty().detach())
    with torch.no_grad():
        for name in ("q.weight", "k.weight", "v.weight"):
            weight(program, name)[4:8] = 0
        weight(program, "out.weight")[:, 4:8] = 0
    rest = torch.stack(
        [
            torch.cat(
                [
                    *(weight(program, f"{n}.weight")[4 * h : 4 * h + 4].flatten() for n in "qkv"),
                    weight(program, "out.weight")[:, 4 * h : 4 * h + 4].flatten(),
                ]
            )
            for h in (0, 2)
        ]
    )
    expected = math.sqrt(rest.shape[1]) * rest.norm(dim=1).sum()
    torch.testing.assert_close(penalty(), expected)
    assert float(expected.detach()) < before


def test_group_lasso_has_a_gradient_of_zero_where_all_is_zero() -> None:
    program = capture(mlp(), (randn(2, 4),))
    with torch.no_grad():
        weight(program, "0.weight")[3] = 0
        weight(program, "2.weight")[:, 3] = 0
    GroupLasso(program)().backward()  # type: ignore[no-untyped-call]
    gradient = weight(program, "0.weight").grad
    assert gradient is not None
    assert bool(torch.isfinite(gradient).all())
    assert bool((gradient[3] == 0).all())


def _trained(
    model: nn.Module, data: Tensor, target: Tensor, strength: float, kind: type[GroupLasso | ScaleL1]
) -> Program:
    program = capture(model, (data[:2],)).copy(share_tensors=False)
    program.train()
    penalty = kind(program)
    optimizer = torch.optim.Adam(list(program.parameters()), lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (program(data) - target).square().mean() + strength * penalty()
        loss.backward()
        optimizer.step()
    return program.eval()


def test_training_with_group_lasso_empties_whole_indices() -> None:
    data = randn(64, 4)
    target = torch.stack([data[:, 0].relu(), data[:, 1].relu()], 1)  # two hidden units are enough

    def norms(strength: float) -> Tensor:
        program = _trained(mlp(), data, target, strength, GroupLasso)
        first, second = weight(program, "0.weight"), weight(program, "2.weight")
        return (first.square().sum(1) + second.square().sum(0)).sqrt().detach().sort().values

    free, penalised = norms(0.0), norms(1e-2)
    assert float(free[0]) > 0.1
    assert float(penalised[4]) < 0.02  # five of eight units have gone, producer and consumer at once
    assert float(penalised[-2]) > 0.5  # and those that are needed have not


def test_training_with_scale_l1_makes_scales_small() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 1, 1))
    data = randn(16, 2, 3, 3)
    target = data[:, :1].relu()
    scales = weight(_trained(model, data, target, 1e-2, ScaleL1), "1.weight").detach().abs()
    assert int((scales < 0.02).sum()) >= 4  # without the penalty the smallest stays above 0.4
    assert float(scales.max()) > 0.3


def test_what_names_nothing_is_refused() -> None:
    program = capture(mlp(), (randn(2, 4),))
    with pytest.raises(UsageError, match=r"`only=9\.\*` matches no group of this model. There are: 0:hidden"):
        GroupLasso(program, only=["9.*"])
    with pytest.raises(UsageError, match="No norm of this model scales an axis that could be removed; use GroupLasso"):
        ScaleL1(program)
