"""Histograms: exact counts, whatever the batches; channel means."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphopt.quantization.histogram import BINS, ChannelMean, ChannelRange, Histogram, NotFiniteError

FINITE = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)  # kernels may flush subnormal numbers to 0


def gathered(values: Tensor, size: int) -> Histogram:
    histogram = Histogram()
    for part in values.split(size):
        histogram.update(part)
    return histogram


def same(one: Histogram, other: Histogram) -> bool:
    described = [(h.low, h.high, h.exponent, h.first, h.counts.tolist()) for h in (one, other)]
    return described[0] == described[1]


@given(st.lists(FINITE, min_size=1, max_size=60), st.integers(1, 60))
def test_batches_do_not_matter(values: list[float], size: int) -> None:
    x = torch.tensor(values)
    assert same(gathered(x, size), gathered(x, len(x)))


@given(st.lists(FINITE, min_size=1, max_size=30), st.lists(FINITE, min_size=1, max_size=30))
def test_merging_is_counting_both(one: list[float], other: list[float]) -> None:
    x, y = torch.tensor(one), torch.tensor(other)
    assert same(gathered(x, 7).merged(gathered(y, 5)), gathered(torch.cat([x, y]), 60))


@given(st.lists(FINITE, min_size=1, max_size=60))
def test_counts_what_lies_in_each_bin(values: list[float]) -> None:
    x = torch.tensor(values)
    histogram = gathered(x, 8)
    width = 2.0**histogram.exponent
    index = torch.floor(x.double() / width).long() - histogram.first
    assert len(histogram.counts) <= BINS
    assert torch.equal(torch.bincount(index, minlength=len(histogram.counts)), histogram.counts)


def test_bins_are_fine_enough() -> None:
    histogram = gathered(torch.linspace(-1, 1, 999), 999)
    assert len(histogram.counts) > BINS // 2


def test_range_holds_zero() -> None:
    histogram = gathered(torch.tensor([2.0, 3.0]), 1)
    assert (histogram.low, histogram.high) == (0.0, 3.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_refuses_what_is_not_finite(bad: float) -> None:
    for statistic in (Histogram(), ChannelMean(0)):
        with pytest.raises(NotFiniteError):
            statistic.update(torch.tensor([[1.0], [bad]]))


def test_extreme_magnitudes() -> None:
    histogram = gathered(torch.tensor([1e38, -1e38, 1e-38, 0.0]), 2)
    assert int(histogram.counts.sum()) == 4


def test_nothing_seen() -> None:
    histogram = gathered(torch.zeros(0), 1)
    assert int(histogram.counts.sum()) == 0


@pytest.mark.parametrize("axis", [1, -1, 0])
def test_channel_mean(axis: int) -> None:
    x = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0))
    mean = ChannelMean(axis)
    for part in x.split(4, dim=0 if axis else 1):
        mean.update(part)
    others = [dim for dim in range(3) if dim != axis % 3]
    torch.testing.assert_close(mean.mean, x.double().mean(others))


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 4, 6)])
def test_ranges_of_channels(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    seen = ChannelRange(-1)
    for part in (x, 2 * x):
        seen.update(part)
    rows = torch.cat([x.reshape(-1, 6), 2 * x.reshape(-1, 6)]).double()
    assert torch.equal(seen.low, rows.amin(0))
    assert torch.equal(seen.high, rows.amax(0))
    torch.testing.assert_close(seen.square, rows.square().mean(0))
