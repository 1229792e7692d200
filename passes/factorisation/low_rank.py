"""The best two factors of a weight, by singular value decomposition.

Plain: the rank-r matrix nearest to W in Frobenius norm keeps the r largest singular values; the error is exactly the
root of the sum of squares of those left out (Eckart and Young, 1936).

With data: what counts is the error of the outputs, |(W - U V) X|. With C = X X^T / n = L L^T it is |(W - U V) L|, so
the same theorem applied to W L gives the best U V, and the error is again exactly the singular values left out, now in
units of the output (Chen et al. 2021, "DRONE"; Wang et al. 2024, "SVD-LLM", section 3.1). Where the layer has a bias,
X is taken about its mean and the bias takes in W - U V times the mean.

C is estimated from few samples, and directions they do not show must not count as free: it is shrunk towards a
multiple of the identity by the oracle approximating shrinkage (Chen, Wiesel, Eldar and Hero 2010, eq. 23).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphopt.statistics.covariance import Covariance

# Least eigenvalue of C over its norm: above the rounding of float32 activations (6e-8), which could otherwise make C
# indefinite; 60 dB below the strongest direction, and 8-bit activations resolve 50.
_FLOOR = 1e-6


@dataclass(frozen=True, eq=False)
class Decomposition:
    """W = left * diag(values) * right, with the values that count for the error.

    Attributes:
        left: (out, full rank).
        values: singular values (full rank,), largest first; of W L with data.
        right: (full rank, in).
        mean: (in,) mean input that the bias makes up for, None where it does not.
    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor
    mean: torch.Tensor | None

    def energy(self, rank: int) -> float:
        """Return the share of squared singular values that `rank` keeps."""
        squares = self.values.square()
        return float(squares[:rank].sum() / squares.sum())

    def rank_for(self, energy: float) -> int:
        """Return the smallest rank that keeps `energy` (0..1) of the squared singular values."""
        kept = self.values.square().cumsum(0)
        # one unit in the last place of the sum, so that energy=1 means every value that counts
        enough = kept >= energy * kept[-1] * (1 - 1e-15)
        return int(enough.to(torch.int8).argmax()) + 1

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return U (out, rank) and V (rank, in), the singular values split evenly between them."""
        root = self.values[:rank].sqrt()
        return self.left[:, :rank] * root, root[:, None] * self.right[:rank]

    def error(self, rank: int) -> float:
        """Return the relative error of `rank`: of the weight, with data of the output, in Frobenius norm."""
        squares = self.values.square()
        return float((squares[rank:].sum() / squares.sum()).sqrt())


def decompose(weight: torch.Tensor, covariance: Covariance | None, *, has_bias: bool) -> Decomposition:
    """Decompose `weight` (out, in) in float64.

    Args:
        weight: the matrix.
        covariance: of the layer's inputs; None for the plain decomposition.
        has_bias: whether a bias can make up for the mean of the error.
    """
    weight = weight.detach().double()
    if covariance is None:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        return _with_fixed_signs(left, values, right, None)
    moments = covariance.about_mean() if has_bias else covariance.about_zero()
    root = torch.linalg.cholesky(shrunk(moments, covariance.rows))  # L
    weight = weight @ root
    del moments  # LAPACK takes ten times as much
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
    return _with_fixed_signs(left, values, right, covariance.mean if has_bias else None)


def shrunk(moments: torch.Tensor, rows: int) -> torch.Tensor:
    """Shrink estimated second moments (features, features) towards the identity times their mean eigenvalue."""
    features = moments.shape[0]
    trace, squares = float(moments.trace()), float(moments.square().sum())
    spread = (rows + 1 - 2 / features) * (squares - trace**2 / features)
    wanted = ((1 - 2 / features) * squares + trace**2) / spread if spread > 0 else 1.0
    mean_eigenvalue = trace / features if trace > 0 else 1.0
    share = min(max(wanted, _FLOOR * squares**0.5 / mean_eigenvalue), 1.0)
    target = torch.eye(features, dtype=moments.dtype, device=moments.device).mul_(mean_eigenvalue)
    return torch.lerp(moments, target, share)


def _with_fixed_signs(
    left: torch.Tensor, values: torch.Tensor, right: torch.Tensor, mean: torch.Tensor | None
) -> Decomposition:
    """Make the largest entry of every row of `right` positive: the decomposition leaves signs open."""
    largest = right.abs().argmax(1, keepdim=True)
    signs = torch.where(right.gather(1, largest) < 0, -1.0, 1.0).to(right.dtype)
    return Decomposition(left * signs.T, values, right * signs, mean)
