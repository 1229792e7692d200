"""The ridge regression that compensation solves, against torch.linalg.lstsq and by hand."""

from __future__ import annotations

import copy
import math
import weakref

import pytest
import torch
from torch import Tensor

from graphopt.passes.pruning.least_squares import RIDGES, Correction, Sums, solve

GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def sums(x: Tensor, y: Tensor) -> Sums:
    found = Sums(x.shape[2])
    for part, wanted in zip(x.split(50), y.split(50), strict=True):
        found.see(part, wanted, wanted)
    return found


def test_a_linear_target_is_found_group_by_group() -> None:
    x, weight, bias = randn(400, 2, 5) + 3, randn(2, 5, 3), randn(2, 3)
    y = torch.einsum("rgi,gio->rgo", x, weight) + bias
    found, before, after = solve(sums(x[:300], y[:300]), sums(x[300:], y[300:]), with_bias=True)
    assert before == 1.0
    assert after < 1e-10
    torch.testing.assert_close(found.weight, weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.bias, bias, atol=1e-4, rtol=0)


def test_without_a_bias_the_mean_is_fitted_by_the_weight() -> None:
    x = randn(400, 1, 4) + 2
    y = x @ torch.ones(4, 1, dtype=torch.float64) + 5
    found, _, _ = solve(sums(x[:300], y[:300]), sums(x[300:], y[300:]), with_bias=False)
    expected = torch.linalg.lstsq(x[:, 0], y[:, 0]).solution
    assert not found.bias.any()
    torch.testing.assert_close(found.weight[0], expected, atol=2e-3, rtol=0)


def test_noise_is_not_fitted() -> None:
    x, y = randn(60, 1, 40), randn(60, 1, 2)
    found, before, after = solve(sums(x[:50], y[:50]), sums(x[50:], y[50:]), with_bias=False)
    assert found.ridge == math.inf or after < before
    assert found.ridge >= 1
    assert found.weight.norm() < 0.5 * torch.linalg.lstsq(x[:, 0], y[:, 0]).solution.norm()


def test_inputs_that_are_zero_or_alike_are_no_trouble() -> None:
    x = torch.cat([randn(90, 1, 1).expand(-1, 1, 3), torch.zeros(90, 1, 2, dtype=torch.float64)], 2)
    y = x.sum(2, keepdim=True)
    found, _, after = solve(sums(x[:60], y[:60]), sums(x[60:], y[60:]), with_bias=True)
    assert after < 1e-9
    assert torch.isfinite(found.weight).all()
    empty = torch.zeros(30, 1, 2, dtype=torch.float64)
    found, _, _ = solve(sums(empty, y[:30]), sums(empty, y[30:60]), with_bias=False)
    assert not found.weight.any()


def test_the_error_is_that_of_the_rows() -> None:
    x, y = randn(80, 2, 3), randn(80, 2, 2)
    total = sums(x, y)
    found, _, _ = solve(copy.deepcopy(total), total, with_bias=True)
    by_hand = (y - torch.einsum("rgi,gio->rgo", x, found.weight) - found.bias).square().sum()
    torch.testing.assert_close(torch.tensor(total.error(found), dtype=torch.float64), by_hand)


def test_one_correction_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is as large as the layer in float64, and there are as many as ridges."""
    held: list[weakref.ref[Correction]] = []
    alive: list[int] = []
    measured = Sums.error

    def error(self: Sums, found: Correction) -> float:
        held.append(weakref.ref(found.weight))
        alive.append(sum(weight() is not None for weight in held))
        return measured(self, found)

    monkeypatch.setattr(Sums, "error", error)
    x, y = randn(80, 1, 3), randn(80, 1, 2)
    solve(sums(x[:60], y[:60]), sums(x[60:], y[60:]), with_bias=True)
    assert alive == [1] * len(RIDGES)
