"""Observers: what they clip, what they minimise, and what they cost."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.quantization.formats import IntegerFormat
from graphopt.quantization.histogram import Histogram, MovingRange
from graphopt.quantization.observers import Observer, choose, statistic
from graphopt.quantization.ops import dequantize, quantize
from graphopt.quantization.qparams import QParams, from_range

UNSIGNED = IntegerFormat(8, signed=False, symmetric=False)
SIGNED = IntegerFormat(8)


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


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse", "entropy"])
def test_nothing_but_zeros(observer: Observer) -> None:
    chosen = choose(histogram(torch.zeros(9)), UNSIGNED, observer)
    assert math.isfinite(chosen.scale)
    assert chosen.scale > 0


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


def test_search_beats_every_grid_point_of_one_side() -> None:
    """For one-sided values the search is exhaustive on its grid."""
    values = normal().abs() ** 2
    best = error(values, choose(histogram(values), UNSIGNED, "mse"))
    tried = [error(values, from_range(0.0, float(values.max()) * share / 20, UNSIGNED)) for share in range(5, 21)]
    assert best <= 1.02 * min(tried)


def test_entropy_is_that_of_its_definition() -> None:
    """For one-sided values: the KL divergence written out (Migacz 2017), over the same candidates."""
    values = (normal() ** 3).relu()
    seen = histogram(values)
    counts, centres = seen.counts.numpy().astype(float), seen.centres.numpy()
    counts[0] = min(counts[:2])
    divergences = {}
    for share in np.linspace(1.0, 0.2, 64):
        scale = seen.high * share / 255
        kept = centres <= seen.high * share + scale / 2
        reference = counts[kept]
        levels = np.rint(centres[kept] / scale).clip(0, 255)
        told = np.zeros_like(reference)
        for level in set(levels):
            members = (levels == level) & (reference > 0)
            told[members] = reference[levels == level].sum() / max(members.sum(), 1)
        told /= told.sum()
        reference[np.flatnonzero(reference)[-1]] += counts[~kept].sum()
        reference /= reference.sum()
        present = reference > 0
        divergences[share] = (reference[present] * np.log(reference[present] / told[present])).sum()
    best = min(divergences, key=divergences.__getitem__)
    assert choose(seen, UNSIGNED, "entropy").range[1] == pytest.approx(seen.high * best, rel=1e-5)
    assert best < 1


def test_entropy_keeps_what_integers_tell_apart() -> None:
    """Nothing is clipped where every value has an integer of its own."""
    values = torch.arange(256).float()
    chosen = choose(histogram(values), UNSIGNED, "entropy")
    assert chosen.range == (0.0, 255.0)


def test_entropy_ignores_what_relu_made_zero() -> None:
    """Zeros have an integer of their own: half of all values being 0 is no reason to clip the others."""
    assert choose(histogram(normal(100_000).relu()), UNSIGNED, "entropy").range[1] > 3.5


def test_entropy_drops_a_lone_outlier() -> None:
    values = torch.cat([normal(100_000).abs(), torch.tensor([40.0])])
    assert choose(histogram(values), UNSIGNED, "entropy").range[1] < 20.0


@given(st.lists(st.tuples(st.floats(-5, 0), st.floats(0, 5)), min_size=1, max_size=20))
def test_average_is_the_mean_of_the_first_hundred(ranges: list[tuple[float, float]]) -> None:
    seen = statistic("average")
    assert isinstance(seen, MovingRange)
    for low, high in ranges:
        seen.update(torch.tensor([low, high], dtype=torch.float64))
    assert (seen.low, seen.high) == pytest.approx(tuple(np.mean(ranges, axis=0)))


def test_average_moves_by_a_hundredth_then() -> None:
    seen = MovingRange()
    for _ in range(100):
        seen.update(torch.tensor([-1.0, 1.0]))
    seen.update(torch.tensor([-1.0, 11.0]))
    assert (seen.low, seen.high) == pytest.approx((-1.0, 1.1))
