"""Scales and zero points of blocks, chosen from the weights alone.

rtn    the smallest and largest weight of a block are its range ("round to nearest")
mse    of many smaller ranges that with the least squared error, then least squares for the scale
hqq    minimises sum |w - w'|**p, p = 0.7, by half-quadratic splitting: Badri and Shaji 2023, "Half-Quadratic
       Quantization of Large Machine Learning Models"

HQQ alternates between e = shrink(w - w'), which takes outliers out of the error, and the parameters that are best for
w - e; there a zero point that is no integer, here a whole one and the scale.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from graphopt.passes.weight_only.blocks import Scales, block_size, bounds, covering, in_blocks, portions
from graphopt.quantization.formats import IntegerFormat

DataFree = Literal["rtn", "mse", "hqq"]

_NARROWEST, _CANDIDATES = 0.4, 25  # shares of the full range that are tried
_REFINEMENTS = 3  # rounds of rounding and least squares
_NORM, _ITERATIONS, _BETA, _GROWTH = 0.7, 20, 10.0, 1.01  # of the reference implementation of HQQ


def choose_scales(matrix: Tensor, form: IntegerFormat, method: DataFree) -> Scales:
    """Choose the scales of a matrix (rows, columns), float32, in runs of rows.

    Args:
        matrix: the weight.
        form: integers to store.
        method: see the module.
    """
    size = block_size(form, matrix.shape[1])
    found = []
    for rows in portions(matrix):
        blocks = in_blocks(matrix[rows], size)
        scales = covering(*bounds(blocks), form)
        if method == "mse":
            scales = _least_squares(blocks, form)
        elif method == "hqq":
            scales = _half_quadratic(blocks, scales, form)
        found.append(scales)
    return Scales(torch.cat([part.scale for part in found]), torch.cat([part.zero for part in found]))


def _steps(blocks: Tensor, scales: Scales, form: IntegerFormat) -> Tensor:
    """Return the integers of blocks less their zero point, floating."""
    zero = scales.zero.unsqueeze(-1)
    return (torch.round(blocks / scales.scale.unsqueeze(-1)) + zero).clamp_(form.low, form.high) - zero


def _least_squares(blocks: Tensor, form: IntegerFormat) -> Scales:
    low, high = bounds(blocks)
    best = covering(low, high, form)
    least = _squares(blocks, best, form)
    for share in torch.linspace(_NARROWEST, 1.0, _CANDIDATES).tolist():
        best, least = _better(blocks, covering(low * share, high * share, form), best, least, form)
    for _ in range(_REFINEMENTS):
        refined = Scales(_best_scale(blocks, _steps(blocks, best, form), best), best.zero)
        best, least = _better(blocks, refined, best, least, form)
    return best


def _better(blocks: Tensor, other: Scales, best: Scales, least: Tensor, form: IntegerFormat) -> tuple[Scales, Tensor]:
    """Take the scales of `other` for the blocks they are better for."""
    error = _squares(blocks, other, form)
    wins = error < least
    scale, zero = torch.where(wins, other.scale, best.scale), torch.where(wins, other.zero, best.zero)
    return Scales(scale, zero), torch.where(wins, error, least)


def _squares(blocks: Tensor, scales: Scales, form: IntegerFormat) -> Tensor:
    return (_steps(blocks, scales, form) * scales.scale.unsqueeze(-1) - blocks).square_().sum(-1)


def _best_scale(wanted: Tensor, steps: Tensor, scales: Scales) -> Tensor:
    """Return the scale with which `steps` come closest to what is wanted, the old one where that is not positive."""
    power = (steps * steps).sum(-1)
    found = (steps * wanted).sum(-1) / torch.where(power > 0, power, 1.0)
    return torch.where((power > 0) & (found > 0), found, scales.scale)


def _half_quadratic(blocks: Tensor, scales: Scales, form: IntegerFormat) -> Scales:
    best, beta = scales, _BETA
    least = _norms(blocks, scales, form)
    for _ in range(_ITERATIONS):
        steps = _steps(blocks, scales, form)
        residual = blocks - steps * scales.scale.unsqueeze(-1)
        wanted = blocks - _shrink(residual, beta)
        zero = scales.zero
        if not form.symmetric:
            codes = steps + zero.unsqueeze(-1)
            zero = torch.round((codes - wanted / scales.scale.unsqueeze(-1)).mean(-1)).clamp(form.low, form.high)
            steps = codes - zero.unsqueeze(-1)
        scales = Scales(_best_scale(wanted, steps, scales), zero)
        error = _norms(blocks, scales, form)
        wins = error < least
        best = Scales(torch.where(wins, scales.scale, best.scale), torch.where(wins, scales.zero, best.zero))
        least = torch.where(wins, error, least)
        beta *= _GROWTH
    return best


def _shrink(x: Tensor, beta: float) -> Tensor:
    """Return the proximal operator of the p-norm, for p below 1 the generalised soft threshold (equation 5)."""
    size = x.abs()
    return x.sign() * (size - size.clamp(min=1e-8).pow(_NORM - 1) / beta).clamp_(min=0.0)


def _norms(blocks: Tensor, scales: Scales, form: IntegerFormat) -> Tensor:
    return (_steps(blocks, scales, form) * scales.scale.unsqueeze(-1) - blocks).abs_().pow_(_NORM).sum(-1)
