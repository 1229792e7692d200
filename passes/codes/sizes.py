"""What a weight takes as codes, in bytes."""

from __future__ import annotations

import math

from graphopt.passes.codes.coded import Form
from graphopt.passes.layers.code_packing import bases, packed_bytes

OPERATORS = 1400  # bytes that the operators take in an ONNX file which look a weight up, for each part of its codes
_FLOAT, _FIRST = 4, 8


def shape_of_codes(rows: int, columns: int, form: Form, *, by_rows: bool) -> tuple[int, int]:
    """Return how many rows of codes are packed, and how many codes in each.

    Args:
        rows: of the weight.
        columns: of it.
        form: how it is stored.
        by_rows: whether rows are read one by one, and packed each on its own.
    """
    count = math.ceil(columns / form.vector)
    return (rows, count) if by_rows else (1, rows * count)


def stored_bytes(rows: int, columns: int, form: Form, *, by_rows: bool) -> int:
    """Return the bytes of codes, tables and scales of a weight; arguments as in `shape_of_codes`."""
    tables = math.ceil(rows / form.group)
    firsts = 0 if tables == 1 else tables if rows % form.group == 0 else rows
    return (
        packed_bytes(*shape_of_codes(rows, columns, form, by_rows=by_rows), bases(form.entries))
        + tables * form.entries * form.vector * _FLOAT
        + (rows * _FLOAT if form.scaled else 0)
        + firsts * _FIRST
    )
