"""Removing indices: parameters sliced, literals brought up to date, meaning kept."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from graphopt.axes.groups import Group
from graphopt.axes.infer import Axes, infer
from graphopt.axes.layout import surviving
from graphopt.axes.proof.masked import check_masked_equivalence
from graphopt.axes.rewrite import remove, slices
from graphopt.capturing.capture import capture
from graphopt.errors import PassError
from graphopt.ir.graph import copy_graph_module, tensor_attribute
from tests import models
from tests.models import EXAMPLES, example

aten = torch.ops.aten
Kept = dict[int, list[int]]


def captured(kind: type[nn.Module]) -> fx.GraphModule:
    return models.captured(kind).graph_module


def graph_of(model: nn.Module, x: Tensor) -> fx.GraphModule:
    return capture(model.double(), (x,)).graph_module


def half(axes: Axes, seed: int = 0) -> Kept:
    draw = random.Random(seed)
    return {g.axis: sorted(draw.sample(range(g.size), max(1, g.size // 2))) for g in axes.groups()}


def call(gm: fx.GraphModule, target: object, index: int = 0) -> fx.Node:
    return [node for node in gm.graph.nodes if node.target == target][index]


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= 1e-9 * a.norm())


@pytest.mark.parametrize("kind", list(EXAMPLES), ids=lambda kind: kind.__name__)
def test_every_model_runs_at_any_batch_with_only_what_is_kept(kind: type[nn.Module]) -> None:
    gm = captured(kind)
    axes = infer(gm)
    kept = half(axes)
    before = {name: tensor_attribute(gm, name).clone() for name in axes.parameters}
    result = remove(gm, axes, kept)
    for batch in (2, 5):
        assert result(example(kind, batch)).shape == gm(example(kind, batch)).shape
    for name, positions in slices(axes, kept).items():
        expected = before[name]
        for dim, indices in positions.items():
            expected = expected[(slice(None),) * dim + (indices,)]
        assert torch.equal(tensor_attribute(result, name), expected)
    assert all(torch.equal(tensor_attribute(gm, name), tensor) for name, tensor in before.items())


@pytest.mark.parametrize("kind", list(EXAMPLES), ids=lambda kind: kind.__name__)
def test_every_model_is_masked_equivalent(kind: type[nn.Module]) -> None:
    gm = captured(kind)
    axes = infer(gm)
    kept = half(axes, seed=1)
    check_masked_equivalence(gm, remove(gm, axes, kept), slices(axes, kept), (example(kind),))


NO_STATISTICS = [
    models.Residual,
    models.Depthwise,
    models.GroupedShuffle,
    models.Dense,
    models.UNet,
    models.OptionA,
    models.SplitAttention,
    models.TiedWeights,
    models.WritesThroughViews,
]


@pytest.mark.parametrize("kind", NO_STATISTICS, ids=lambda kind: kind.__name__)
def test_pruned_equals_the_original_with_consumers_zeroed(kind: type[nn.Module]) -> None:
    gm = captured(kind)
    axes = infer(gm)
    kept = half(axes)
    x = example(kind)
    masked, pruned = consumers_zeroed(gm, axes.groups(), kept)(x), remove(gm, axes, kept)(x)
    assert close(masked, pruned)
    assert not close(gm(x), pruned)


def consumers_zeroed(gm: fx.GraphModule, groups: list[Group], kept: Mapping[int, list[int]]) -> fx.GraphModule:
    """Zero the slices of removed indices in every weight that sums over them: masking without the oracle.

    Where no weight does (query times key), zero them in what makes the factors.
    """
    result = copy_graph_module(gm)
    zeroed: dict[str, Tensor] = {}
    for group in groups:
        for member in group.consumers or group.members:
            tensor = zeroed.setdefault(member.parameter, tensor_attribute(gm, member.parameter).detach().clone())
            alive = set(surviving(member.layout, {group.axis: kept[group.axis]}))
            gone = [i for i in range(tensor.shape[member.dim]) if i not in alive]
            tensor.index_fill_(member.dim, torch.tensor(gone, dtype=torch.long), 0)
    for name, tensor in zeroed.items():
        owner, _, leaf = name.rpartition(".")
        result.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor)
    return result


def test_literals_follow_the_layouts() -> None:
    gm = captured(models.GroupedShuffle)
    axes = infer(gm)
    sizes = {g.name: g.axis for g in axes.groups()}
    kept = {sizes["stem:channels"]: [0, 2], sizes["grouped:channels#2"]: [1, 2, 3], sizes["stem:channels#2"]: [3]}
    result = remove(gm, axes, kept)
    # 3 groups x 4 inputs -> 2 x 1, 3 groups x [4 | 4] outputs -> 2 x [4 | 3].
    assert call(result, aten.conv2d.default, 1).args[6] == 2
    assert tensor_attribute(result, "grouped.weight").shape == (14, 1, 3, 3)
    assert list(call(result, aten.view.default).args[1])[1:3] == [2, 7]
    split = call(result, aten.split_with_sizes.default)
    assert list(split.args[1]) == [8, 6]


def test_the_default_scale_of_attention_is_kept() -> None:
    gm = captured(models.FusedAttention)
    axes = infer(gm)
    dim = next(g for g in axes.groups() if g.kind == "head_dim")
    node = call(remove(gm, axes, {dim.axis: [0, 1]}), aten.scaled_dot_product_attention.default)
    assert node.kwargs["scale"] == pytest.approx(6**-0.5)
    other = next(g for g in axes.groups() if g.kind == "heads")
    node = call(remove(gm, axes, {other.axis: [0, 1]}), aten.scaled_dot_product_attention.default)
    assert "scale" not in node.kwargs


def test_heads_in_a_dynamic_dimension_are_recomputed() -> None:
    gm = captured(models.SplitAttention)
    axes = infer(gm)
    heads = next(g for g in axes.groups() if g.kind == "heads")
    result = remove(gm, axes, {heads.axis: [1]})
    merged = call(result, aten.reshape.default)
    assert [str(size) for size in merged.meta["val"].shape][1:] == ["6", "4"]
    assert not isinstance(merged.meta["val"].shape[0], int)
    assert result(example(models.SplitAttention, 7)).shape == (7, 6, 5)


class Squeezed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)[:, None].squeeze().squeeze(-1)[:, None].squeeze(1))


def test_squeeze_spares_a_dimension_that_shrank_to_one() -> None:
    x = torch.randn(2, 5, dtype=torch.float64)
    gm = graph_of(Squeezed(), x)
    axes = infer(gm)
    (group,) = axes.groups()
    kept = {group.axis: [2]}
    assert close(consumers_zeroed(gm, [group], kept)(x), remove(gm, axes, kept)(x))


@pytest.mark.parametrize(
    "between",
    [
        lambda x: torch.cat([x[:, 2:], x[:, :2]], 1),
        lambda x: x.view(-1, 4, 3).transpose(1, 2).reshape(-1, 12),
        lambda x: x.narrow(1, 0, 12).unflatten(1, (3, 4)).movedim(1, 2).flatten(1),
        lambda x: F.glu(torch.cat([x, x], 1)),
        lambda x: F.pad(x[:, ::2], (0, 6)) + x,
        lambda x: torch.stack([x[:, 0::2], x[:, 1::2]], -1).flatten(1),
        lambda x: x[:, None].expand(-1, 4, -1).mean(1) + x.new_full((12,), 0.5),
        lambda x: x.repeat_interleave(2, 1).view(-1, 12, 2).sum(-1),
        lambda x: x.repeat(1, 3).view(-1, 3, 12).sum(1),
        lambda x: torch.where(x > 0, x, torch.zeros_like(x)).clamp(max=2.0),
        lambda x: torch.cat(x.split([5, 3, 4], 1)[::-1], 1),
        lambda x: torch.baddbmm(x[:, None], x[:, None, :1], x[:, None]).squeeze(1),
        lambda x: torch.einsum("bhd,bhd->bhd", x.view(-1, 4, 3), x.view(-1, 4, 3)).flatten(1),
    ],
)
def test_rearrangements_mean_the_same_after_removal(between: Callable[[Tensor], Tensor]) -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(between(self.first(x)))

    torch.manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64)
    gm = graph_of(Between(), x)
    axes = infer(gm)
    for seed in range(3):
        kept = half(axes, seed)
        pruned = remove(gm, axes, kept)
        check_masked_equivalence(gm, pruned, slices(axes, kept), (x,))
        assert pruned(x[:2]).shape == (2, 3)


class ChosenRows(nn.Module):
    """Adds up rows of three layers that data choose, of which one gets narrower."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.same = nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x).relu()
        chosen = up.sum(-1) > 0.5
        return x + (self.down(up[chosen]) * self.same(x)[chosen] + x[chosen]).sum(0)


def test_rows_that_data_choose_stay_as_many() -> None:
    x = torch.randn(4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gm = graph_of(ChosenRows(), x)
    axes = infer(gm)
    kept = half(axes)
    result = remove(gm, axes, kept)
    assert [group.name for group in axes.groups()] == ["up:hidden"]
    assert [n.meta["val"].shape[0] for n in result.graph.nodes if n.target is aten.index.Tensor] == [
        n.meta["val"].shape[0] for n in gm.graph.nodes if n.target is aten.index.Tensor
    ]
    assert check_masked_equivalence(gm, result, slices(axes, kept), (x,)) < 1e-12


def test_tied_tensors_stay_one_and_keep_their_flags() -> None:
    model = models.TiedWeights().double()
    ep = torch.export.export(model, (example(model),), strict=False)
    gm = ep.module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    axes = infer(gm)
    result = remove(gm, axes, half(axes))
    assert tensor_attribute(result, "embed.weight") is tensor_attribute(result, "head.weight")


def test_untouched_tensors_are_shared_and_metadata_is_fresh() -> None:
    gm = captured(models.Residual)
    axes = infer(gm)
    inner = next(g for g in axes.groups() if g.name == "inner:channels")
    result = remove(gm, axes, {inner.axis: [0, 3, 5]})
    assert tensor_attribute(result, "stem.weight") is tensor_attribute(gm, "stem.weight")
    assert isinstance(tensor_attribute(result, "inner.weight"), nn.Parameter)
    for node in result.graph.nodes:
        if node.op == "get_attr":
            assert node.meta["val"].shape == tensor_attribute(result, node.target).shape
    assert call(result, aten.conv2d.default, 1).meta["val"].shape[1] == 3
    assert call(gm, aten.conv2d.default, 1).meta["val"].shape[1] == 12


def test_nothing_to_remove_changes_nothing() -> None:
    gm = captured(models.Residual)
    axes = infer(gm)
    kept = {g.axis: list(range(g.size)) for g in axes.groups()}
    assert slices(axes, kept) == {}
    assert remove(gm, axes, kept).code == gm.code


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], "non-empty"),
        ([1, 0], "strictly increasing"),
        ([0, 0], "strictly increasing"),
        ([7, 99], "has 12 indices"),
        ([-1, 2], "has 12 indices"),
    ],
)
def test_impossible_lists_are_refused(indices: list[int], message: str) -> None:
    gm = captured(models.Residual)
    axes = infer(gm)
    inner = next(g for g in axes.groups() if g.name == "inner:channels")
    with pytest.raises(PassError, match=message):
        remove(gm, axes, {inner.axis: indices})


def test_frozen_and_unknown_axes_are_refused() -> None:
    gm = captured(models.Residual)
    axes = infer(gm)
    frozen = next(r for r in axes.refusals() if r.name == "head:hidden")
    with pytest.raises(PassError, match="must stay whole: reaches graph output `linear`"):
        remove(gm, axes, {frozen.axis: [0]})
    with pytest.raises(PassError, match="does not exist"):
        remove(gm, axes, {10**6: [0]})
