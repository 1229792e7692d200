"""Weights of one size: a sign, or nothing, and a scale for each output.

binary      s * (+1 | -1)           s = mean |w|                (Rastegari et al. 2016, "XNOR-Net", equation 6)
ternary     s * (+1 | 0 | -1)       the largest |w| and their mean, as many as leave the least error

What is nearest to s or 0 is the larger part of |w|: of n largest weights the best s is their mean, and the error is
sum w^2 - (sum |w|)^2 / n. So sorting and sums of what is sorted give the best s, and the best n, of all.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIGNS = {"binary": (-1.0, 1.0), "ternary": (-1.0, 0.0, 1.0)}


def binary(rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the numbers of signs in `SIGNS` and scales of rows of least squared error.

    Args:
        rows: (rows, columns) float32.
        weights: (rows, columns), what the squared error of each counts; not negative.

    Returns:
        Codes (rows, columns) uint8, and scales (rows, 1) float64.
    """
    size = rows.abs().double()
    return (rows >= 0).to(torch.uint8), _means((size * weights).sum(1, keepdim=True), weights.sum(1, keepdim=True))


def ternary(rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `binary` does, of three numbers."""
    size, order = rows.abs().double().sort(1, descending=True)
    mass = weights.double().gather(1, order)
    sums, counts = (size * mass).cumsum(1), mass.cumsum(1)
    best = (sums * _means(sums, counts)).argmax(1, keepdim=True)
    kept = torch.arange(rows.shape[1]).expand_as(order) <= best
    chosen = torch.zeros_like(kept).scatter_(1, order, kept)
    return (rows.sign() * chosen + 1).to(torch.uint8), _means(sums.gather(1, best), counts.gather(1, best))


def _means(sums: Tensor, counts: Tensor) -> Tensor:
    return torch.where(counts > 0, sums / torch.where(counts > 0, counts, 1.0), 0.0).double()
