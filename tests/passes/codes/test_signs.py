"""Signs and scales of least squared error, against all there are."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from graphopt.passes.codes.signs import SIGNS, binary, ternary


def squared_error(row: Tensor, weights: Tensor, values: Tensor) -> float:
    """Return the least of any scale that is not negative."""
    power = float((weights * values * values).sum())
    scale = max(0.0, float((weights * values * row).sum()) / power) if power else 0.0
    return float((weights * (row - scale * values).square()).sum())


def least(row: Tensor, weights: Tensor, signs: Sequence[float]) -> float:
    every = itertools.product(signs, repeat=len(row))
    return min(squared_error(row, weights, torch.tensor(values, dtype=torch.float64)) for values in every)


@pytest.mark.parametrize("encode", [ternary, binary])
@pytest.mark.parametrize("weighted", [False, True])
def test_nothing_is_closer(encode: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, 6, generator=generator)
    rows[0], rows[1, 1:], rows[2], rows[3, :3] = 0, 0, 0.5, rows[3, 0]
    weights = torch.rand(12, 6, generator=generator) if weighted else torch.ones(12, 6)
    signs = SIGNS[encode.__name__]
    codes, scale = encode(rows, weights)
    found = torch.tensor(signs, dtype=torch.float64)[codes.long()] * scale
    for row, counts, each in zip(rows.double(), weights.double(), found, strict=True):
        error = float((counts * (row - each).square()).sum())
        assert error == pytest.approx(least(row, counts, signs), rel=1e-6, abs=1e-12)


def test_rows_that_count_nothing_have_no_scale() -> None:
    for encode in (ternary, binary):
        codes, scale = encode(torch.randn(2, 5), torch.zeros(2, 5))
        assert bool((scale == 0).all())
        assert codes.shape == (2, 5)
