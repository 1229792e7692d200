"""A weight that is not finite is named, whatever the passes; the data are not blamed for it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import CaptureError

PASSES = ("", "fold", "prune", "prune:criterion=taylor", "svd", "drop_blocks", "sparsity24", "int8", "recover")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 32), nn.BatchNorm1d(32), nn.Linear(32, 2)
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x))) + self.mask


def optimize(model: nn.Module, passes: str = "") -> graphopt.Result:
    return graphopt.optimize(model.eval(), data=torch.randn(32, 4), passes=passes, target=None)


@pytest.mark.parametrize("passes", PASSES)
def test_the_weight_is_named(passes: str) -> None:
    model = Net()
    model.first.weight.data[1, 2] = math.nan
    with pytest.raises(CaptureError, match=r"`first\.weight` of the model holds NaN \(1 of 128 values\)") as info:
        optimize(model, passes)
    assert info.value.exit_code == 3


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [("norm.running_var", math.nan, "NaN"), ("last.bias", math.inf, "infinite values"), ("mask", math.nan, "NaN")],
)
def test_so_is_any_other_tensor(name: str, value: float, kind: str) -> None:
    model = Net()
    model.state_dict()[name][0] = value
    with pytest.raises(CaptureError, match=rf"`{name}` of the model holds {kind} \(\d of \d+ values\)"):
        optimize(model)


FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


class Stored(nn.Module):
    """A weight that is stored as float8, and an output of that."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(32, 4).to(dtype))
        self.hidden, self.last, self.dtype = nn.Linear(32, 16), nn.Linear(16, 2), dtype

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.last(self.hidden(nn.functional.linear(x, self.weight.float())).relu())
        return y, y.to(self.dtype)


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_is_looked_at_too(dtype: torch.dtype) -> None:
    model = Stored(dtype)
    assert optimize(model, "fold").report.rows
    model.weight[1, 2] = math.nan
    with pytest.raises(CaptureError, match=r"`weight` of the model holds NaN \(1 of 128 values\)"):
        optimize(model)


@pytest.mark.parametrize("passes", ["prune:round_to=1", "svd:rank=2:round_to=1", "recover:epochs=1"])
def test_passes_work_around_float8(passes: str) -> None:
    result = graphopt.optimize(
        Stored(torch.float8_e5m2).eval(), torch.randn(64, 4), passes, target=None, check="full", bench=False
    )
    assert result.program(torch.randn(3, 4))[1].dtype is torch.float8_e5m2


def test_a_mask_of_infinities_is_no_fault() -> None:
    assert optimize(Net()).report.rows
