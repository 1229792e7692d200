"""GPTQ: rounds column after column and lets the columns that are left make up for the error.

Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", algorithm 1:
with H = E[x x^T] + damping and U the upper Cholesky factor of its inverse,

    e = (w_i - w'_i) / U_ii        w_j -= e U_ij        for the columns j that are not rounded yet

The scales of blocks are chosen before, so that columns may go in the order of E[x_i^2], the largest first.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from graphopt.quantization.formats import IntegerFormat

_TOGETHER = 128  # columns whose errors are handed on to those behind them at once
_MOST_DAMPING = 1.0


class Nearest(Protocol):
    """Chooses what some columns of a weight become."""

    def __call__(self, values: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is stored of them, (rows,) or (rows, 1), and what that stands for, of the shape of the values.

        Args:
            values: (rows, columns), what is left to be stood for.
            columns: their numbers.
        """


def round_in_order(
    matrix: Tensor, scale: Tensor, zero: Tensor, form: IntegerFormat, moments: Tensor, damping: float
) -> Tensor:
    """Return the integers (rows, columns) of a weight.

    Args:
        matrix: the weight (rows, columns).
        scale: of each of its numbers, (rows, columns).
        zero: the integers that stand for 0, likewise.
        form: integers to store.
        moments: E[x x^T] of what it is multiplied with, (columns, columns) float64.
        damping: what is added to the diagonal, as a share of its mean.
    """

    def nearest(values: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        integers = (torch.round(values / scale[:, columns]) + zero[:, columns]).clamp_(form.low, form.high)
        return integers, (integers - zero[:, columns]) * scale[:, columns]

    return InOrder(moments, damping).choose(matrix, nearest).to(form.dtype)


class InOrder:
    """The order of the columns of a weight, and how those that are left make up for errors."""

    def __init__(self, moments: Tensor, damping: float, size: int = 1) -> None:
        """Factor the inverse of what inputs have in common.

        Args:
            moments: E[x x^T] of what the weight is multiplied with, (columns, columns) float64.
            damping: what is added to the diagonal, as a share of its mean.
            size: consecutive columns that are chosen at once; all are a multiple of it.
        """
        self._size = size
        self._order = torch.argsort(moments.diagonal().reshape(-1, size).sum(1), descending=True, stable=True)
        self._columns = (self._order.unsqueeze(1) * size + torch.arange(size)).flatten()
        self._upper = _inverse_factor(moments[self._columns][:, self._columns], damping).float()

    def choose(self, matrix: Tensor, nearest: Nearest) -> Tensor:
        """Return what is stored of rows of the weight, (rows, columns / size), of their dtype.

        Args:
            matrix: (rows, columns).
            nearest: what `size` columns become.
        """
        size, upper, left = self._size, self._upper, matrix[:, self._columns]
        stored = left.new_empty(len(left), len(self._order))
        together = max(1, _TOGETHER // size) * size
        for start in range(0, left.shape[1], together):
            stop = min(start + together, left.shape[1])
            errors = torch.empty_like(left[:, start:stop])
            for first in range(start, stop, size):
                here = slice(first, first + size)
                found, reals = nearest(left[:, here], self._columns[here])
                stored[:, self._order[first // size]] = found.reshape(-1).to(stored.dtype)
                for i in range(first, first + size):
                    errors[:, i - start] = (left[:, i] - reals[:, i - first]) / upper[i, i]
                    left[:, i + 1 : stop] -= torch.outer(errors[:, i - start], upper[i, i + 1 : stop])
            left[:, stop:] -= errors @ upper[start:stop, stop:]
        return stored


def _inverse_factor(moments: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse of damped moments; damped more where there is none.

    It is that of moments as shares of their mean: those of denormals have an inverse beyond float32.
    """
    mean = float(moments.diagonal().mean())
    moments = moments / (mean or 1.0)
    while True:
        damped = moments + torch.eye(len(moments), dtype=moments.dtype) * (damping if mean else 1.0)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed) or damping >= _MOST_DAMPING:
            break
        damping = min(_MOST_DAMPING, 10 * damping or 1e-6)
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return upper
