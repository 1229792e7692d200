"""One setting for each site, best within limits: against every combination there is."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from graphopt.measure.selection import Setting, select


def test_is_the_best_of_all_combinations() -> None:
    draw = random.Random(0)
    impossible = 0
    for _ in range(60):
        sites = [
            [
                {"loss": 10 ** draw.uniform(-6, 0), "bytes": draw.uniform(0, 1e6), "seconds": draw.uniform(-1e-5, 1e-4)}
                for _ in range(draw.randint(1, 4))
            ]
            for _ in range(draw.randint(1, 5))
        ]
        limits = {"bytes": draw.uniform(0, len(sites) * 6e5), "seconds": draw.uniform(0, len(sites) * 8e-5)}
        fitting = [
            _sum(sites, chosen, "loss")
            for chosen in itertools.product(*(range(len(settings)) for settings in sites))
            if all(_sum(sites, chosen, name) <= limit for name, limit in limits.items())
        ]
        found = select(sites, "loss", limits)
        impossible += not fitting
        assert (found is None) == (not fitting)
        if found is not None:
            assert _sum(sites, found, "loss") == pytest.approx(min(fitting), rel=1e-5)
            assert all(_sum(sites, found, name) <= limit * (1 + 1e-6) + 1e-12 for name, limit in limits.items())
    assert 0 < impossible < 60


def test_what_is_infinite_is_never_chosen() -> None:
    sites = [[{"loss": math.inf, "bytes": 1.0}, {"loss": 5.0, "bytes": 4.0}]]
    assert select(sites, "bytes", {"loss": 10.0}) == [1]
    assert select(sites, "bytes", {"loss": 1.0}) is None


def test_without_sites_there_is_nothing_to_choose() -> None:
    assert select([], "loss", {"bytes": 0.0}) == []
    assert select([], "loss", {"bytes": -1.0}) is None


def test_small_numbers_count_as_much_as_large_ones() -> None:
    sites = [[{"loss": 2e-13}, {"loss": 1e-13, "bytes": 1e9}], [{"loss": 3e-13}, {"loss": 1e-13, "bytes": 1e9}]]
    assert select(sites, "loss", {"bytes": 1e9}) == [0, 1]


def test_large_costs_that_need_not_be_paid_hide_no_small_ones() -> None:
    sites = [
        [{"loss": 0.0}, {"loss": loss, "bytes": -1.0}, {"loss": 1.0, "bytes": -3.0}] for loss in (4e-8, 1e-9, 1e-8)
    ]
    assert select(sites, "loss", {"bytes": -1.0}) == [0, 1, 0]
    assert select(sites, "loss", {"bytes": -2.0}) == [0, 1, 1]


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        select([[{"loss": math.nan}]], "loss", {})


def _sum(sites: list[list[Setting]], chosen: object, name: str) -> float:
    return sum(settings[index].get(name, 0.0) for settings, index in zip(sites, chosen, strict=True))  # type: ignore[call-overload]
