"""Ridge regression of a correction, from sums over rows that come in pieces.

    min over D, d of  sum |r - x D - d|^2 + ridge |D|^2           r = y - x W - b, what W leaves of the target y

so that a large ridge, or few rows, means the weights that are there and not zero. Which ridge is best is judged on
rows that were held out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch

from graphopt.statistics.moments import Moments

# Fractions of the mean of the Gram matrix's diagonal. ResNets take 1e-3 in their first layers and 1 in their last;
# an infinite one leaves the weights as they are and corrects the bias.
RIDGES = (1e-6, 1e-3, 1e-2, 1e-1, 1.0, math.inf)


class Sums(Moments):
    """Moments of inputs, and of inputs with residuals, group by group.

    Attributes:
        squares: sum of squared residuals.
        target: sum of squared targets.
    """

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self._inputs = inputs
        self.squares = 0.0
        self.target = 0.0

    def see(self, x: torch.Tensor, r: torch.Tensor, y: torch.Tensor) -> None:
        """Take in rows: x (rows, groups, inputs), r and y (rows, groups, outputs).

        Raises:
            NotFiniteError: they are not finite.
        """
        self.add(x, r)
        self.squares += float(r.square().sum(dtype=torch.float64))
        self.target += float(y.square().sum(dtype=torch.float64))

    def __iadd__(self, other: Sums) -> Self:
        if other.rows:
            self.pool(other.rows, other.mean, other.scatter)
        self.squares, self.target = self.squares + other.squares, self.target + other.target
        return self

    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return those of inputs (groups, inputs) and residuals (groups, outputs)."""
        return self.mean[:, : self._inputs], self.mean[:, self._inputs :]

    def products(self, *, with_bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return those of inputs (groups, inputs, inputs), and with residuals; about the mean where a bias takes it."""
        products = self.scatter if with_bias else self.about_zero().mul_(self.rows)
        return products[..., : self._inputs], products[..., self._inputs :]

    def error(self, found: Correction) -> float:
        """Return the squared error that is left with a correction, 0 without rows."""
        if not self.rows:
            return 0.0
        gram, cross = self.products(with_bias=True)
        x, r = self.means()
        error = self.squares - self.rows * r.square().sum()
        error += (found.weight * (gram @ found.weight).sub_(cross, alpha=2)).sum()
        left = r - torch.einsum("gi,gio->go", x, found.weight) - found.bias
        return float(error + self.rows * left.square().sum())


@dataclass(frozen=True, slots=True)
class Correction:
    """What to add to a layer.

    Attributes:
        weight: (groups, inputs, outputs).
        bias: (groups, outputs), zero where the layer can have none.
        ridge: the fraction it was found with.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    ridge: float


def solve(fit: Sums, held_out: Sums, *, with_bias: bool) -> tuple[Correction, float, float]:
    """Find the ridge that leaves least on the held-out rows, and fit a correction with it to all rows.

    Args:
        fit: sums over the rows to fit; they take in the others.
        held_out: sums over the rows to judge by.
        with_bias: whether the bias may change.

    Returns:
        The correction, and the relative error of the held-out rows before and with what the same ridge gives without
        them: an estimate for the correction, which has seen them.
    """
    scale = held_out.target or 1.0
    before = held_out.squares / scale
    errors = [error / scale for error in map(held_out.error, _corrections(fit, RIDGES, with_bias))]
    best = min(range(len(errors)), key=errors.__getitem__)
    fit += held_out
    (final,) = _corrections(fit, (RIDGES[best],), with_bias)
    return final, before, max(errors[best], 0.0)


def _corrections(sums: Sums, ridges: tuple[float, ...], with_bias: bool) -> Iterator[Correction]:
    """Yield the correction by each ridge: one at a time, since each is as large as the layer in float64."""
    gram, cross = sums.products(with_bias=with_bias)
    mean_x, mean_r = sums.means()
    diagonal = gram.diagonal(dim1=1, dim2=2).mean(1)  # (groups,)
    for ridge in ridges:
        if math.isinf(ridge):
            bias = mean_r if with_bias else torch.zeros_like(mean_r)
            yield Correction(torch.zeros_like(cross), bias, ridge)
            continue
        # Inputs that are all zero leave nothing to divide by; any positive number gives them a correction of zero.
        added = torch.where(diagonal > 0, diagonal * ridge, torch.ones_like(diagonal))
        weight = _solution(gram, cross, added)
        bias = mean_r - torch.einsum("gi,gio->go", mean_x, weight) if with_bias else torch.zeros_like(mean_r)
        yield Correction(weight, bias, ridge)
        del weight


def _solution(gram: torch.Tensor, cross: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """Solve (gram + added) W = cross; a group too ill-conditioned for what is added stays as it is, with W = 0."""
    shifted = gram.clone()
    shifted.diagonal(dim1=1, dim2=2).add_(added.view(-1, 1))
    factor, failed = torch.linalg.cholesky_ex(shifted)
    del shifted
    return torch.cholesky_solve(cross, factor).masked_fill_(failed.view(-1, 1, 1) != 0, 0.0)
