"""Numbers and arrays of NumPy in a pickle: a type of a table, and as many bytes as it takes.

Training scripts keep them beside the weights (a best score, a generator's state). NumPy itself would make any type
that a text names, of Python objects too; here only numbers become anything, and an array is a view of the file's bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from graphopt.loading.pickle_records import Global, Made
from graphopt.loading.refusal import DamagedError, HostileError

Value = Callable[[Any], Any]  # returns what a record inside of another stands for

_TYPES = frozenset(["b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"])


def _dtype(record: Made, value: Value) -> np.dtype[Any]:
    match record.arguments, value(record.state):
        case (str(name), 0, 1), (3, "<" | "|", None, None, None, -1, -1, 0) if name in _TYPES:
            return np.dtype(name)
    raise HostileError("it holds something of NumPy other than numbers")


def _scalar(record: Made, value: Value) -> bool | int | float | complex:
    dtype, content = map(value, record.arguments)
    return _view(dtype, (), content, "C").item()  # type: ignore[no-any-return]


def _array(record: Made, value: Value) -> np.ndarray[Any, Any]:
    match record.arguments, value(record.state):
        case (Global("numpy.ndarray"), (0,), _), (1, shape, dtype, bool(column_major), content):
            return _view(dtype, shape, content, "F" if column_major else "C")
    raise HostileError("it makes an array of NumPy as torch.save never does")


def _array_of_buffer(record: Made, value: Value) -> np.ndarray[Any, Any]:
    content, dtype, shape, order = map(value, record.arguments)
    return _view(dtype, shape, content, order)


def _view(dtype: Any, shape: Any, content: Any, order: Any) -> np.ndarray[Any, Any]:
    good = isinstance(dtype, np.dtype) and type(shape) is tuple and type(content) is bytes and order in ("C", "F")
    if not good or not all(type(size) is int and size >= 0 for size in shape):
        raise HostileError("it makes an array of NumPy as torch.save never does")
    if math.prod(shape) * dtype.itemsize != len(content):
        raise DamagedError(f"it holds an array of NumPy of other than the {len(content)} bytes it has")
    if dtype.kind == "b" and content not in (b"\0", b"\1"):
        raise HostileError("it holds an array of truth values of NumPy, which graphopt reads singly")
    return np.frombuffer(content, dtype).reshape(shape, order=order)


CALLS: dict[str, Callable[[Made, Value], Any]] = {
    "numpy.dtype": _dtype,
    **{
        f"numpy.{core}.{name}": make  # `core` before version 2
        for core in ("core", "_core")
        for name, make in (
            ("multiarray.scalar", _scalar),
            ("multiarray._reconstruct", _array),
            ("numeric._frombuffer", _array_of_buffer),
        )
    },
}
STATEFUL = frozenset(name for name, make in CALLS.items() if make in (_dtype, _array))
