"""GPTQ: rounds column after column and lets the columns that are left make up for the error.

Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", algorithm 1:
with H = E[x x^T] + damping and U the upper Cholesky factor of its inverse,

    e = (w_i - w'_i) / U_ii        w_j -= e U_ij        for the columns j that are not rounded yet

The scales of blocks are chosen before, so that columns may go in the order of E[x_i^2], the largest first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.quantization.formats import IntegerFormat

_TOGETHER = 128  # columns whose errors are handed on to those behind them at once
_MOST_DAMPING = 1.0


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
    order = torch.argsort(moments.diagonal(), descending=True, stable=True)
    upper = _inverse_factor(moments[order][:, order], damping).float()
    scale, zero = scale[:, order], zero[:, order]
    left = matrix[:, order].clone()
    integers = torch.empty_like(left)
    for start in range(0, left.shape[1], _TOGETHER):
        stop = min(start + _TOGETHER, left.shape[1])
        errors = torch.empty_like(left[:, start:stop])
        for i in range(start, stop):
            integers[:, i] = (torch.round(left[:, i] / scale[:, i]) + zero[:, i]).clamp_(form.low, form.high)
            rounded = (integers[:, i] - zero[:, i]) * scale[:, i]
            errors[:, i - start] = (left[:, i] - rounded) / upper[i, i]
            left[:, i + 1 : stop] -= torch.outer(errors[:, i - start], upper[i, i + 1 : stop])
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    result = torch.empty_like(integers)
    result[:, order] = integers
    return result.to(form.dtype)


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
