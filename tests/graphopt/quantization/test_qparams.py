"""Scales and zero points: what they cover, what they keep exact, what they minimise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.quantization.formats import IntegerFormat
from graphopt.quantization.histogram import Histogram
from graphopt.quantization.ops import dequantize, quantize
from graphopt.quantization.qparams import QParams, choose, from_range, quantize_weight, weight_scales

UNSIGNED = IntegerFormat(8, signed=False, symmetric=False)
MIDDLE = IntegerFormat(8, signed=False)
SIGNED = IntegerFormat(8)
WEIGHT = IntegerFormat(8, granularity="channel", narrow=True)


def histogram(values: torch.Tensor) -> Histogram:
    result = Histogram()
    result.update(values)
    return result


def normal(count: int = 4000) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def error(values: torch.Tensor, chosen: QParams) -> float:
    scale = torch.tensor(chosen.scale)
    dtype = torch.uint8 if chosen.low >= 0 else torch.int8
    zero = torch.tensor(chosen.zero_point, dtype=dtype)
    back = dequantize(quantize(values, scale, zero, None, chosen.low, chosen.high), scale, zero, None)
    return float((back - values).square().mean())


@pytest.mark.parametrize("integers", [UNSIGNED, MIDDLE, SIGNED])
@given(low=st.floats(-1e4, 1e4, width=32), high=st.floats(-1e4, 1e4, width=32))
def test_covers_the_range_and_zero(integers: IntegerFormat, low: float, high: float) -> None:
    low, high = min(low, high), max(low, high)
    chosen = from_range(low, high, integers)
    least, most = chosen.range
    slack = chosen.scale / 2 * (1 + 1e-5)  # the zero point is rounded
    assert least <= min(low, 0.0) + slack
    assert most >= max(high, 0.0) - slack
    assert integers.low <= chosen.zero_point <= integers.high
    assert chosen.scale > 0
    assert float(np.float32(chosen.scale)) == chosen.scale


def test_zero_points() -> None:
    assert from_range(0.0, 5.0, UNSIGNED).zero_point == 0
    assert from_range(-5.0, 0.0, UNSIGNED).zero_point == 255
    assert from_range(-5.0, 5.0, SIGNED).zero_point == 0
    assert from_range(-5.0, 5.0, MIDDLE).zero_point == 128


def test_nothing_but_zeros() -> None:
    chosen = choose(histogram(torch.zeros(9)), UNSIGNED, "mse")
    assert math.isfinite(chosen.scale)
    assert chosen.scale > 0


@given(st.floats(0.5, 8.0, width=32))
def test_limit_is_not_exceeded(limit: float) -> None:
    chosen = from_range(0.0, limit, UNSIGNED, limit=limit)
    assert chosen.range[1] <= limit
    assert chosen.range[1] == pytest.approx(limit, rel=1e-6)


def test_observers_differ_in_what_they_clip() -> None:
    values = torch.cat([normal(), torch.tensor([100.0])])
    widths = {
        observer: choose(histogram(values), UNSIGNED, observer, percentile=99.0).range[1]
        for observer in ("minmax", "percentile", "mse")
    }
    assert widths["minmax"] == pytest.approx(100.0, rel=0.01)
    assert widths["percentile"] < 4.0
    assert widths["percentile"] < widths["mse"] < 100.0


@pytest.mark.parametrize("integers", [UNSIGNED, SIGNED])
@pytest.mark.parametrize("values", [normal(), normal().relu(), normal() ** 3], ids=["normal", "relu", "heavy tails"])
def test_mse_has_no_more_error_than_the_others(integers: IntegerFormat, values: torch.Tensor) -> None:
    seen = histogram(values)
    errors = {observer: error(values, choose(seen, integers, observer)) for observer in ("minmax", "percentile", "mse")}
    assert errors["mse"] <= 1.01 * min(errors.values())  # bins stand for their centres


def test_percentile_never_crosses_zero() -> None:
    low, high = choose(histogram(normal().relu() + 1), UNSIGNED, "percentile", percentile=60).range
    assert low == 0.0
    assert high > 1.0


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_weights_are_within_half_a_step(axis: int | None) -> None:
    weight = normal(6 * 5 * 3).reshape(6, 5, 3)
    scales = weight_scales(weight, WEIGHT, axis)
    stored = quantize_weight(weight, scales, WEIGHT, axis)
    back = dequantize(stored, scales, torch.zeros_like(scales, dtype=torch.int8), axis)
    assert stored.dtype is torch.int8
    assert int(stored.abs().max()) == 127
    assert float((back - weight).abs().max()) <= float(scales.max()) / 2 * (1 + 1e-5)


def test_silent_channel() -> None:
    weight = torch.stack([torch.zeros(4), torch.ones(4)])
    scales = weight_scales(weight, WEIGHT, 0)
    assert bool((scales > 0).all())
    assert quantize_weight(weight, scales, WEIGHT, 0).tolist() == [[0] * 4, [127] * 4]


def test_search_beats_every_grid_point_of_one_side() -> None:
    """For one-sided values the search is exhaustive on its grid."""
    values = normal().abs() ** 2
    best = error(values, choose(histogram(values), UNSIGNED, "mse"))
    tried = [error(values, from_range(0.0, float(values.max()) * share / 20, UNSIGNED)) for share in range(5, 21)]
    assert best <= 1.02 * min(tried)
