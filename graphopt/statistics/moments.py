"""Second moments of rows that come in pieces: one accumulator for everybody who fits anything to activations."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphopt.ir.finite import all_finite
from graphopt.quantization.histogram import NotFiniteError

_ROWS_PER_SAMPLE = 64


class Moments:
    """Number, mean and scatter of rows, pooled exactly (Chan, Golub, LeVeque 1983, equation 2.1).

    The products of a piece are taken about its own mean, so that none of the digits of its rows are lost to that, in
    the precision of the rows; what is pooled is float64.

    Attributes:
        rows: how many were taken in.
        mean: (*groups, features).
        scatter: sums of products of what rows are off the mean, (*groups, features that the first operand of `add`
            has, features); or of its squares alone, of the shape of the mean.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self.scatter = torch.zeros((), dtype=torch.float64)

    def add(self, x: torch.Tensor, *further: torch.Tensor) -> None:
        """Take in rows.

        Args:
            x: (rows, *groups, features), at least in single precision.
            further: features whose products with `x` are wanted, not those among themselves; they go behind its own.

        Raises:
            NotFiniteError: they hold NaN or infinities, or what squares to that.
        """
        if not len(x):
            return
        parts = (x, *further)
        means = [part.mean(0, dtype=torch.float64) for part in parts]
        products = _products(parts, means)
        if not all_finite(products):  # values of 1e20 square to more than single precision holds
            products = _products([part.double() for part in parts], means)
        if not all_finite(products):
            raise NotFiniteError
        self.pool(len(x), torch.cat(means, -1), products)

    def pool(self, rows: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        """Take in rows of known mean and scatter."""
        total = self.rows + rows
        shift = mean.double() - self.mean
        if self.rows:
            one, other = _factors(shift, scatter)
            self.scatter.add_(scatter).addcmul_(one, other, value=self.rows * rows / total)
        else:
            self.scatter = scatter.to(torch.float64, copy=True)  # it is added to
        self.mean = self.mean + shift * (rows / total)
        self.rows = total

    def about_mean(self) -> torch.Tensor:
        """Return the covariance."""
        return self.scatter / self.rows

    def about_zero(self) -> torch.Tensor:
        """Return the second moments themselves."""
        return self.about_mean().addcmul_(*_factors(self.mean, self.scatter))


def _products(parts: Sequence[torch.Tensor], means: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the products of the first part with every one, each about its mean, in the precision of the parts."""
    centred = [(part - mean.to(part.dtype)).movedim(0, -2) for part, mean in zip(parts, means, strict=True)]
    return torch.cat([centred[0].mT @ part for part in centred], -1)


def _factors(mean: torch.Tensor, scatter: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two views of a mean whose product is of the shape of a scatter."""
    if scatter.dim() == mean.dim():
        return mean, mean
    return mean[..., : scatter.shape[-2], None], mean.unsqueeze(-2)


def representative(rows: int, samples: int) -> torch.Tensor:
    """Choose rows to take in: positions of one sample (pixels, tokens) are alike, more cost time and say little.

    Args:
        rows: how many there are, sample by sample.
        samples: of how many samples.

    Returns:
        The numbers of at most 64 a sample, evenly spaced.
    """
    chosen = min(rows, _ROWS_PER_SAMPLE * samples)
    return torch.arange(chosen) * rows // max(1, chosen)
