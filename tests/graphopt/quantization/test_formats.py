"""Formats of integers: what follows from bits and sign."""

from __future__ import annotations

import pytest
import torch

from graphopt.quantization.formats import Block, IntegerFormat, storage_dtype


@pytest.mark.parametrize(
    ("form", "low", "high", "zero_point", "dtype"),
    [
        (IntegerFormat(8), -128, 127, 0, torch.int8),
        (IntegerFormat(8, narrow=True), -127, 127, 0, torch.int8),
        (IntegerFormat(8, signed=False), 0, 255, 128, torch.uint8),
        (IntegerFormat(4), -8, 7, 0, torch.int8),
        (IntegerFormat(4, signed=False, narrow=True), 1, 15, 8, torch.uint8),
        (IntegerFormat(2, signed=False, granularity=Block(32)), 0, 3, 2, torch.uint8),
        (IntegerFormat(16), -(2**15), 2**15 - 1, 0, torch.int32),
        (IntegerFormat(1, signed=False), 0, 1, 1, torch.uint8),
    ],
)
def test_ranges(form: IntegerFormat, low: int, high: int, zero_point: int, dtype: torch.dtype) -> None:
    assert (form.low, form.high, form.zero_point, form.dtype) == (low, high, zero_point, dtype)


@pytest.mark.parametrize("bits", [0, 32])
def test_bits_have_bounds(bits: int) -> None:
    with pytest.raises(ValueError, match="1 to 31 bits"):
        IntegerFormat(bits)


def test_blocks_hold_something() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        Block(0)


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [(0, 255, torch.uint8), (0, 15, torch.uint8), (-128, 127, torch.int8), (-8, 7, torch.int8), (-1, 255, torch.int32)],
)
def test_storage(low: int, high: int, dtype: torch.dtype) -> None:
    assert storage_dtype(low, high) is dtype


def test_storage_has_an_end() -> None:
    with pytest.raises(ValueError, match="int32 is the widest"):
        storage_dtype(0, 2**40)
