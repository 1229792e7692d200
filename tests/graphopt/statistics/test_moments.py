"""The accumulator of second moments, against float64 on all rows at once."""

from __future__ import annotations

import pytest
import torch

from graphopt.quantization.histogram import NotFiniteError
from graphopt.statistics.moments import Moments, representative

GENERATOR = torch.Generator().manual_seed(0)
FAR = 3000.0  # from zero, in deviations: products about zero would keep no digit of the covariance in float32


def rows(*shape: int) -> torch.Tensor:
    mixing = torch.randn(shape[-1], shape[-1], generator=GENERATOR)
    return torch.randn(shape, generator=GENERATOR) @ mixing + FAR


def test_no_digits_are_lost_to_a_mean_far_from_zero() -> None:
    x = rows(400, 5)
    found = Moments()
    for piece in x.split([1, 99, 300]):
        found.add(piece)
    wide = x.double()
    assert found.rows == 400
    torch.testing.assert_close(found.mean, wide.mean(0), rtol=1e-12, atol=0)
    expected = torch.cov(wide.T, correction=0)
    torch.testing.assert_close(found.about_mean(), expected, rtol=0, atol=1e-6 * float(expected.diagonal().max()))
    torch.testing.assert_close(found.about_zero(), wide.T @ wide / 400, rtol=1e-11, atol=0)
    naive = (x.T @ x).double() / 400 - torch.outer(x.mean(0), x.mean(0)).double()
    assert float((naive - expected).abs().max()) > 0.1 * float(expected.diagonal().max())


def test_products_with_further_features_group_by_group() -> None:
    x, y = rows(60, 2, 4), rows(60, 2, 3)
    found = Moments()
    for one, other in zip(x.split(25), y.split(25), strict=True):
        found.add(one, other)
    both = torch.cat([x, y], -1).double().movedim(0, 1)  # (groups, rows, features)
    assert found.scatter.shape == (2, 4, 7)
    torch.testing.assert_close(found.mean, both.mean(1), rtol=1e-12, atol=0)
    expected = torch.stack([torch.cov(group.T, correction=0) for group in both])[:, :4]
    torch.testing.assert_close(found.about_mean(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    torch.testing.assert_close(found.about_zero(), both[..., :4].mT @ both / 60, rtol=1e-11, atol=0)


def test_squares_alone() -> None:
    x = rows(90, 6).double()
    found = Moments()
    for piece in x.split([40, 50]):
        variance, mean = torch.var_mean(piece, 0, correction=0)
        found.pool(len(piece), mean, variance * len(piece))
    torch.testing.assert_close(found.about_mean(), x.var(0, correction=0))
    torch.testing.assert_close(found.about_zero(), x.square().mean(0))


def test_what_is_pooled_is_not_written_to() -> None:
    found, scatter = Moments(), torch.ones(3, dtype=torch.float64)
    for _ in range(2):
        found.pool(4, torch.zeros(3), scatter)
    assert torch.equal(scatter, torch.ones(3, dtype=torch.float64))
    assert torch.equal(found.scatter, 2 * scatter)


def test_values_whose_squares_single_precision_does_not_hold() -> None:
    x = torch.randn(50, 3, generator=GENERATOR) * 1e20
    found = Moments()
    found.add(x)
    torch.testing.assert_close(found.about_mean(), torch.cov(x.double().T, correction=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("value", "place"), [(torch.nan, 0), (torch.inf, 0), (torch.nan, 1), (torch.inf, 1)])
def test_what_is_not_finite_is_refused_and_leaves_nothing_behind(value: float, place: int) -> None:
    found = Moments()
    parts = [rows(20, 3), rows(20, 2)]
    found.add(*parts)
    before = found.scatter.clone()
    parts[place][7, 1] = value
    with pytest.raises(NotFiniteError):
        found.add(*parts)
    assert found.rows == 20
    assert torch.equal(found.scatter, before)


def test_no_rows_are_no_trouble() -> None:
    found = Moments()
    found.add(torch.zeros(0, 3))
    assert found.rows == 0


def test_a_few_rows_stand_for_a_sample() -> None:
    assert representative(10, 2).tolist() == list(range(10))
    chosen = representative(1000, 2)
    assert len(chosen) == 128
    assert chosen[0] == 0
    assert {int(step) for step in chosen.diff()} == {7, 8}
    assert len(representative(0, 0)) == 0
