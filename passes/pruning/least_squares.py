"""Ridge regression of a correction, from sums over rows that come in pieces.

    min over D, d of  sum |r - x D - d|^2 + ridge |D|^2           r = y - x W - b, what W leaves of the target y

so that a large ridge, or few rows, means the weights that are there and not zero. Which ridge is best is judged on
rows that were held out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# Fractions of the mean of the Gram matrix's diagonal. ResNets take 1e-3 in their first layers and 1 in their last;
# an infinite one leaves the weights as they are and corrects the bias.
RIDGES = (1e-6, 1e-3, 1e-2, 1e-1, 1.0, math.inf)


class Sums:
    """Second moments of inputs and residuals, group by group: products in the rows' precision, sums in float64."""

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        self.rows = 0
        self.gram = torch.zeros(groups, inputs, inputs, dtype=torch.float64)
        self.cross = torch.zeros(groups, inputs, outputs, dtype=torch.float64)
        self.inputs = torch.zeros(groups, inputs, dtype=torch.float64)
        self.residual = torch.zeros(groups, outputs, dtype=torch.float64)
        self.squares = 0.0  # sum of squared residuals
        self.target = 0.0  # sum of squared targets

    def add(self, x: torch.Tensor, r: torch.Tensor, y: torch.Tensor) -> None:
        """Take in rows: x (rows, groups, inputs), r and y (rows, groups, outputs)."""
        wide, tall = x.transpose(0, 1), r.transpose(0, 1)  # (groups, rows, ...)
        self.rows += len(x)
        self.gram += wide.transpose(1, 2) @ wide
        self.cross += wide.transpose(1, 2) @ tall
        self.inputs += x.sum(0, dtype=torch.float64)
        self.residual += r.sum(0, dtype=torch.float64)
        self.squares += float(r.square().sum(dtype=torch.float64))
        self.target += float(y.square().sum(dtype=torch.float64))

    def __add__(self, other: Sums) -> Sums:
        total = Sums(*self.cross.shape)
        for name in ("rows", "gram", "cross", "inputs", "residual", "squares", "target"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def error(self, found: Correction) -> float:
        """Return the squared error that is left with a correction."""
        moved = self.gram @ found.weight  # (groups, inputs, outputs)
        error = self.squares - 2 * (found.weight * self.cross).sum() + (found.weight * moved).sum()
        pull = torch.einsum("gi,gio->go", self.inputs, found.weight) - self.residual
        error += 2 * (found.bias * pull).sum() + self.rows * found.bias.square().sum()
        return float(error)


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
    """Find the correction that leaves least on the held-out rows, and fit it to all rows.

    Args:
        fit: sums over the rows to fit.
        held_out: sums over the rows to judge by.
        with_bias: whether the bias may change.

    Returns:
        The correction, and the relative error of the held-out rows before and with it; the correction judged is the
        one fitted without them.
    """
    scale = held_out.target or 1.0
    candidates = _corrections(fit, RIDGES, with_bias)
    errors = [held_out.error(candidate) / scale for candidate in candidates]
    best = min(range(len(errors)), key=errors.__getitem__)
    (final,) = _corrections(fit + held_out, (RIDGES[best],), with_bias)
    return final, held_out.squares / scale, max(errors[best], 0.0)


def _corrections(sums: Sums, ridges: tuple[float, ...], with_bias: bool) -> list[Correction]:
    gram, cross = sums.gram, sums.cross
    mean_x, mean_r = sums.inputs / sums.rows, sums.residual / sums.rows
    if with_bias:
        gram = gram - sums.rows * mean_x.unsqueeze(2) * mean_x.unsqueeze(1)
        cross = cross - sums.rows * mean_x.unsqueeze(2) * mean_r.unsqueeze(1)
    diagonal = gram.diagonal(dim1=1, dim2=2).mean(1)  # (groups,)
    identity = torch.eye(gram.shape[1], dtype=torch.float64)
    found = []
    for ridge in ridges:
        if math.isinf(ridge):
            bias = mean_r if with_bias else torch.zeros_like(mean_r)
            found.append(Correction(torch.zeros_like(cross), bias, ridge))
            continue
        # Inputs that are all zero leave nothing to divide by; any positive number gives them a correction of zero.
        added = torch.where(diagonal > 0, diagonal * ridge, torch.ones_like(diagonal))
        factor, failed = torch.linalg.cholesky_ex(gram + added.view(-1, 1, 1) * identity)
        solvable = (failed == 0).view(-1, 1, 1)  # a group too ill-conditioned for this ridge stays as it is
        weight = torch.where(solvable, torch.cholesky_solve(cross, factor), torch.zeros_like(cross))
        bias = mean_r - torch.einsum("gi,gio->go", mean_x, weight) if with_bias else torch.zeros_like(mean_r)
        found.append(Correction(weight, bias, ridge))
    return found
