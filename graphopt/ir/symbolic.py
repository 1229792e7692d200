"""Expressions of sizes, as a trace has them, computed for many sizes at once: sympy takes a millisecond for each."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np

from graphopt.ir.torch_internals import PythonReferenceAnalysis, sympy_interp

_SLOWLY = 512  # points that sympy substitutes, a millisecond each


def computed(expression: Any, sizes: Mapping[Any, Any]) -> Any:
    """Return the values of an expression, by symbol of arrays of one shape, and of plain numbers."""
    return sympy_interp(_Arrays(), dict(sizes), expression)


def holds(guard: Any, sizes: Mapping[Any, Any]) -> Any:
    """Say for which of such sizes a guard holds, or asks nothing, since it divides by zero there.

    Powers of sizes do not fit into integers: numbers are floating, and exact up to 2^53.
    """
    arrays = _Arrays()
    wide = {symbol: np.asarray(values, np.float64) for symbol, values in sizes.items()}
    try:
        with np.errstate(all="ignore"):
            return sympy_interp(arrays, wide, guard) | arrays.undefined
    except (AttributeError, KeyError, TypeError):  # of `_Arrays`, or of torch's table of functions
        return _held_one_by_one(guard, sizes)


def _held_one_by_one(guard: Any, sizes: Mapping[Any, Any]) -> Any:
    """Say the same of a guard with functions that arrays do not have (`round`, bits); beyond some, that it holds."""
    points = np.broadcast_arrays(*sizes.values())
    found = np.ones(points[0].size, bool)
    for index, values in enumerate(zip(*(array.ravel().tolist() for array in points), strict=True)):
        known = dict(zip(sizes, values, strict=True))
        try:
            found[index] = bool(sympy_interp(PythonReferenceAnalysis, known, guard))
        except ZeroDivisionError:
            pass
        except (AttributeError, KeyError, TypeError):  # torch lacks it (`Where`, `ModularIndexing` in 2.13)
            if index == _SLOWLY:
                break
            found[index] = bool(guard.subs(known) != False)  # noqa: E712 # sympy's own, which is no `bool`
    return found.reshape(points[0].shape)


def _static(function: Any) -> Any:
    return staticmethod(function)


class _Arrays:
    """What torch's interpreter of sympy calls for each function."""

    add, mul, pow_by_natural = map(_static, (operator.add, operator.mul, operator.pow))
    eq, ne, lt, gt, le, ge = map(
        _static, (operator.eq, operator.ne, operator.lt, operator.gt, operator.le, operator.ge)
    )
    and_, or_, not_, where = map(_static, (np.logical_and, np.logical_or, np.logical_not, np.where))
    minimum, maximum, abs, sqrt, log2 = map(_static, (np.minimum, np.maximum, np.abs, np.sqrt, np.log2))

    def __init__(self) -> None:
        self.undefined: Any = False

    @staticmethod
    def constant(number: Any, _: Any) -> Any:
        return bool(number) if number.is_Boolean else int(number) if number.is_Integer else float(number)

    @staticmethod
    def to_dtype(number: Any, _: Any) -> Any:
        return number

    @staticmethod
    def floor_to_int(number: Any, _: Any) -> Any:
        return np.floor(number)

    @staticmethod
    def ceil_to_int(number: Any, _: Any) -> Any:
        return np.ceil(number)

    @staticmethod
    def trunc_to_int(number: Any, _: Any) -> Any:
        return np.trunc(number)

    def floordiv(self, number: Any, divisor: Any) -> Any:
        return number // self._divisor(divisor)

    def mod(self, number: Any, divisor: Any) -> Any:
        return number % self._divisor(divisor)

    def truediv(self, number: Any, divisor: Any) -> Any:
        return number / self._divisor(divisor)

    python_mod, int_truediv = mod, truediv

    def modular_indexing(self, number: Any, divisor: Any, modulus: Any) -> Any:
        return self.mod(self.floordiv(number, divisor), modulus)

    def _divisor(self, number: Any) -> Any:
        self.undefined = self.undefined | np.equal(number, 0)
        return np.where(np.equal(number, 0), 1, number)
