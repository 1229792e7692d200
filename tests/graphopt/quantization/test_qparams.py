"""Scales and zero points: what they cover, what they keep exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.quantization.formats import IntegerFormat
from graphopt.quantization.ops import dequantize
from graphopt.quantization.qparams import from_range, quantize_weight, weight_scales

UNSIGNED = IntegerFormat(8, signed=False, symmetric=False)
MIDDLE = IntegerFormat(8, signed=False)
SIGNED = IntegerFormat(8)
WEIGHT = IntegerFormat(8, granularity="channel", narrow=True)


def normal(count: int = 4000) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


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


@given(st.floats(0.5, 8.0, width=32))
def test_limit_is_not_exceeded(limit: float) -> None:
    chosen = from_range(0.0, limit, UNSIGNED, limit=limit)
    assert chosen.range[1] <= limit
    assert chosen.range[1] == pytest.approx(limit, rel=1e-6)


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
