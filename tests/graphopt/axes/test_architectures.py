"""Structures that whole architectures brought up, each as small as it gets: half of every group goes, and is proved."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, fx, nn

from graphopt.axes.infer import Axes, infer
from graphopt.axes.proof.masked import check_masked_equivalence
from graphopt.axes.rewrite import remove, slices
from graphopt.capturing.normal_form import normalise

_EXACT = 1e-10  # float64 rounding of a few dozen sums


def exported(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    gm = torch.export.export(model.double().eval(), inputs, strict=False).module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    return normalise(gm)


def prove(model: nn.Module, *inputs: Tensor) -> Axes:
    """Take half of the indices of every group, prove the rest right, and return what was inferred."""
    gm = exported(model, *inputs)
    axes = infer(gm)
    draw = random.Random(0)
    kept = {g.axis: sorted(draw.sample(range(g.size), (g.size + 1) // 2)) for g in axes.groups()}
    assert kept
    error = check_masked_equivalence(gm, remove(gm, axes, kept), slices(axes, kept), inputs)
    assert error < _EXACT
    return axes


class MaskOfEachHead(nn.Module):
    """A mask predicted from the data, repeated for every head and made a float of zeros and -inf (Mask2Former)."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.ModuleDict({name: nn.Linear(6, 16) for name in "qkv"})
        self.mask, self.out, self.head = nn.Linear(6, 5), nn.Linear(16, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 5, 6)
        q, k, v = (m(x).view(-1, 5, 4, 4).transpose(1, 2).flatten(0, 1) for m in self.project.values())
        hidden = self.mask(x) < 0
        hidden = hidden.unsqueeze(1).repeat(1, 4, 1, 1).flatten(0, 1) & ~torch.eye(5, dtype=torch.bool)
        added = torch.zeros_like(hidden, dtype=x.dtype).masked_fill_(hidden, float("-inf"))
        y = torch.baddbmm(added, q, k.transpose(1, 2)).softmax(-1) @ v
        y = y.unflatten(0, (-1, 4)).transpose(1, 2).flatten(2)
        return self.head(x + self.out(y))


def test_a_mask_repeated_for_heads_differs_between_samples() -> None:
    axes = prove(
        MaskOfEachHead(), torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )
    assert 4 in [group.size for group in axes.groups()]


class AllOrNothing(nn.Module):
    """A gate that is open only if every hidden feature is positive, shut if any is large (checks of LLaVA)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        return self.second(h) * torch._is_all_true(h >= 0) + torch._is_any_true(h > 100)


def test_whether_all_or_any_are_true_says_nothing_about_a_width() -> None:
    axes = prove(AllOrNothing(), torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert [group.size for group in axes.groups()] == [8]
    assert not axes.unknown


class StandardisedByBatchNorm(nn.Module):
    """Kernels standardised by a batch norm in training mode, over what a kernel sums (BiT)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.inner.weight
        flat = F.batch_norm(weight.reshape(1, 12, -1), None, None, training=True, momentum=0.0)
        x = F.conv2d(self.stem(x).relu(), flat.reshape_as(weight), self.inner.bias)
        return self.head(x.relu().mean((2, 3)))


def test_kernels_standardised_by_a_batch_norm_lose_what_they_sum() -> None:
    images = torch.randn(2, 3, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    axes = prove(StandardisedByBatchNorm(), images)
    assert [group.size for group in axes.groups()] == [8, 12]


class LastOfTheStates(nn.Module):
    """States of two chunks side by side, made as zeros and read from both ends (xLSTM)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        states = torch.zeros(x.shape[0], 2 * h.shape[-1])
        return self.second(h.tanh() * states[:, : h.shape[-1]].cos() + states[:, -h.shape[-1] :].exp())


def test_zeros_are_read_from_both_ends() -> None:
    axes = prove(LastOfTheStates(), torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert [group.size for group in axes.groups()] == [8]
