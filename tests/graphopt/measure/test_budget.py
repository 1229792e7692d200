"""Budgets and meters: shares and amounts, what exceeds them, and what pays in a runtime."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from graphopt.capturing.capture import capture
from graphopt.ir.program import Program
from graphopt.measure.bench import Spread
from graphopt.measure.budget import UNITS, Budget, Guard, Meter, exceeded
from graphopt.measure.cost import Cost, cost


@dataclass(frozen=True)
class Options:
    """Options of some pass, a few of them limits."""

    rank: int = 3
    flops: float | None = None
    bytes: float | None = 1000


def program_of(width: int) -> Program:
    return capture(nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 4)), torch.zeros(2, 4))


WIDE, NARROW = program_of(16), program_of(8)


def timer(*values: float) -> Meter:
    """Return a meter in whose runtime these are the shares of the time, one after another."""
    found = iter(values)
    return Meter(WIDE, lambda program, reference: Spread.of([next(found)]))


def test_a_budget_is_read_from_the_options_that_are_limits() -> None:
    assert Budget.of(Options(flops=0.5)).limits == {"flops": 0.5, "bytes": 1000.0}
    assert Budget.of(Options(bytes=None)).limits == {}


def test_amounts_are_shares_of_the_original() -> None:
    found = Budget({"parameters": 74, "flops": 0.25, "bytes": 400}).shares(WIDE)
    assert cost(WIDE) == Cost(parameters=148, flops=256, bytes=592)
    assert found == {"parameters": 0.5, "flops": 0.25, "bytes": 400 / 592}


@given(st.integers(2, 10**12), st.integers(1, 10**12))
def test_an_amount_is_met_by_what_is_no_more_and_by_nothing_else(amount: int, left: int) -> None:
    whole = 10**12
    share = amount / whole
    assert (exceeded({"bytes": left / whole}, {"bytes": share}) == []) is (left <= amount)


@pytest.mark.parametrize(
    ("unit", "limit"),
    [("flops", 0), ("flops", -1), ("bytes", 1), ("bytes", 1.5), ("latency", 2), ("latency", 1), ("flops", math.nan)],
)
def test_what_is_neither_a_share_nor_an_amount(unit: str, limit: float) -> None:
    with pytest.raises(ValueError, match=f"`{unit}` is a share of the original's"):
        Budget({unit: limit})


def test_a_meter_measures_what_is_asked_for_in_one_order() -> None:
    meter = timer(0.7)
    left = meter.left(NARROW, {"latency": 0.5, "bytes": 0.5, "flops": 0.5})
    assert list(left) == ["flops", "bytes", "latency"]
    assert left == {"flops": 0.5, "bytes": cost(NARROW).bytes / 592, "latency": 0.7}
    assert meter.timed == [0.7]
    assert exceeded(left, {"flops": 0.5, "bytes": 0.6, "latency": 0.5}) == ["latency"]
    assert list(meter.left_of(cost(NARROW), dict.fromkeys(UNITS, 0.5))) == ["parameters", "flops", "bytes"]


def test_what_cannot_be_told_exceeds() -> None:
    assert exceeded({"latency": math.nan}, {"latency": 0.5}) == ["latency"]


@pytest.mark.parametrize(("share", "said"), [(0.9, ""), (1.0, "1.000 (1.000-1.000)"), (math.nan, "nan (nan-nan)")])
def test_only_what_is_faster_pays(share: float, said: str) -> None:
    guard = Guard(lambda program, reference: Spread(share, share, share, share, share))
    assert guard.objects("all", NARROW, WIDE) == said
    assert list(guard.measured) == ["all"]


@pytest.mark.parametrize(("upper", "pays"), [(0.99, True), (1.0, False), (1.02, False)])
def test_a_gain_within_the_noise_does_not_pay(upper: float, pays: bool) -> None:
    guard = Guard(lambda program, reference: Spread(0.9, 0.95, 0.97, upper, 1.1))
    assert guard.objects("all", NARROW, WIDE) == ("" if pays else f"0.970 (0.950-{upper:.3f})")


def test_limits_and_amounts_are_told_as_they_were_given() -> None:
    budget = Budget({"bytes": 2_500_000.0, "flops": 0.35, "parameters": 74})
    assert [budget.limit(unit) for unit in budget.limits] == ["bytes=2500000", "flops=0.35", "parameters=74"]
    said = [budget.amount(unit, 0.5, WIDE) for unit in budget.limits]
    assert said == ["296 bytes", "50.0% of the FLOPs", "74 parameters"]
