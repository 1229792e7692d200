"""Every type of number is looked at, those that `torch.isfinite` does not take too."""

from __future__ import annotations

import math

import pytest
import torch

from graphopt.ir.finite import all_finite, computable, only_stored

FLOATS = [value for value in vars(torch).values() if isinstance(value, torch.dtype) and value.is_floating_point]


@pytest.mark.parametrize("dtype", dict.fromkeys(FLOATS), ids=str)
def test_every_type_of_number(dtype: torch.dtype) -> None:
    if dtype is torch.float4_e2m1fn_x2:  # packed; torch has no conversion
        packed = torch.arange(4, dtype=torch.uint8).view(dtype)
        assert all_finite(packed)
        assert torch.equal(computable(packed) + 0, torch.arange(4, dtype=torch.uint8))
        return
    values = torch.tensor([1.0, 2.0, 0.5, 4.0]).to(dtype)
    assert all_finite(values)
    assert torch.equal(computable(values).double(), values.double())
    assert torch.isfinite(computable(values)).all()
    values[2] = math.nan
    assert not all_finite(values)


@pytest.mark.parametrize("dtype", dict.fromkeys(FLOATS), ids=str)
def test_what_torch_only_stores(dtype: torch.dtype) -> None:
    values = torch.zeros(2, dtype=torch.uint8).view(dtype) if dtype.itemsize == 1 else torch.zeros(2, dtype=dtype)
    try:
        values + values
    except NotImplementedError:
        assert only_stored(dtype)
    else:
        assert not only_stored(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2])
def test_infinities(dtype: torch.dtype) -> None:
    assert not all_finite(torch.tensor([1.0, math.inf]).to(dtype))
    assert not all_finite(torch.tensor([math.inf, -math.inf]).to(dtype))


def test_a_sum_beyond_the_type_is_no_infinity() -> None:
    assert all_finite(torch.full((64,), torch.finfo(torch.float32).max))


def test_integers_and_complex_numbers() -> None:
    assert all_finite(torch.tensor([1, 2]))
    assert all_finite(torch.tensor([True]))
    assert not all_finite(torch.tensor([complex(0, math.inf)]))
