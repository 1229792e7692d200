"""Distillation knows layers, and what carries a value on, by family; each of these was once missed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphopt import capture
from graphopt.distillation.addresses import Tap, addresses
from graphopt.distillation.cuts import residual_points
from graphopt.distillation.objective import targets_of
from graphopt.distillation.pairing import pair_taps
from graphopt.distillation.taps import output_values
from graphopt.ir.operators import short_name


class Head(nn.Module):
    """What a function makes of eight features and a matrix of classes."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.body = nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.rand(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.body(x).relu(), self.weight)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: torch.einsum("bi,ij->bj", x, w),
        lambda x, w: torch.tensordot(x, w, 1),
        lambda x, w: torch.inner(x, w.t()),
        lambda x, w: torch.bmm(x[:, None], w.expand(len(x), 8, 5)).squeeze(1),
        lambda x, w: (x @ w).unflatten(1, (1, 5)).select(1, 0),
        lambda x, w: (x @ w).chunk(1, 1)[0],
        lambda x, w: nn.functional.alpha_dropout(x @ w, 0.5, False),
    ],
)
def test_logits_whatever_product_makes_them(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    targets, _ = targets_of(capture(Head(function), torch.randn(3, 8)))
    assert [target.kind for target in targets] == ["logits"]


class Chain(nn.Module):
    """Layers in a row without branches, one of them of a rarer kind."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(8, 8), layer, nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        made = self.layer(self.first(x).relu())
        return self.last(made[0] if isinstance(made, tuple) else made)


@pytest.mark.parametrize("layer", [nn.RNN(8, 8, batch_first=True), nn.GRU(8, 8, batch_first=True)])
def test_what_enters_a_recurrent_layer_is_a_point(layer: nn.Module) -> None:
    points = residual_points(capture(Chain(layer), torch.randn(3, 5, 8)))
    assert [short_name(point) for point in points] == ["relu", "getitem"]


def test_a_value_pairs_behind_a_lifted_or_doubled_identity() -> None:
    class Copied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(nn.functional.feature_alpha_dropout(self.one(x), 0.5, False).positive())

    program = capture(Copied(), torch.randn(3, 8))
    taps = [Tap(address, node) for address, node in addresses(program).items() if address == "one:linear"]
    pairs, refusals = pair_taps(program, program, taps)
    assert [(pair.teacher.address, pair.student.address) for pair in pairs] == [("one:linear", "one:linear")]
    assert refusals == []
    assert short_name(output_values(program)[0]) == "linear"
