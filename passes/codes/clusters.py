"""k-means: the entries of a table that come closest to many numbers, or vectors, the squared errors weighted.

Clusters of numbers are intervals: with sums over what is sorted, a step costs as much as there are entries (Lloyd 1982,
"Least squares quantization in PCM"), for many tables at once. Vectors begin with k-means++ (Arthur and Vassilvitskii
2007). Both look at some (`drawn`) where there are many; whoever is left out is assigned to what came of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NUMBERS, _VECTORS_EACH = 1 << 20, 256  # looked at: numbers, and vectors for each entry
_STEPS, _VECTOR_STEPS = 100, 25
_BINS = 512
_DISTANCES = 1 << 18  # at once: they stay in the cache of a core
_TINY = torch.finfo(torch.float64).tiny


def drawn(n: int, count: int, size: int, generator: torch.Generator) -> Tensor:
    """Return which of `n` vectors are looked at for `count` entries, their numbers: some of many, else all."""
    most = _NUMBERS if size == 1 else _VECTORS_EACH * count
    return torch.randint(n, (most,), generator=generator) if n > most else torch.arange(n)


def cluster(vectors: Tensor, weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return tables of `count` entries, (tables, count, size) float32; numbers in ascending order.

    Args:
        vectors: (tables, n, size) float32, finite.
        weights: likewise, what a squared error counts; not negative.
        count: of entries.
        generator: draws where clusters of vectors begin.
    """
    tables, _, size = vectors.shape
    if size == 1:
        return _levels(vectors[..., 0].double(), weights[..., 0].double(), count).float().unsqueeze(2)
    found = [_centroids(*one, count, generator) for one in zip(vectors, weights.float(), strict=True)]
    return torch.stack(found) if tables else vectors.new_zeros(0, count, size)


def nearest(vectors: Tensor, weights: Tensor, tables: Tensor) -> Tensor:
    """Return the number of the entry that each vector is closest to, (tables, n) int64.

    Args:
        vectors: (tables, n, size).
        weights: likewise, what a squared error counts.
        tables: (tables, count, size); of numbers in ascending order.
    """
    if tables.shape[2] == 1:
        between = (tables[:, 1:, 0] + tables[:, :-1, 0]) / 2
        return torch.searchsorted(between, vectors[..., 0].contiguous())
    return torch.stack([_closest(*one) for one in zip(vectors, weights, tables, strict=True)])


def _closest(vectors: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    terms = torch.cat([table.square(), -2 * table], 1).T  # of w (t - x)^2 - w x^2 = w t^2 - 2 w x t
    step = max(1, _DISTANCES // len(table))
    parts = zip(torch.split(vectors, step), torch.split(weights, step), strict=True)
    return torch.cat([torch.argmin(torch.cat([w, w * x], 1) @ terms, 1) for x, w in parts])


def _levels(values: Tensor, weights: Tensor, count: int) -> Tensor:
    values, order = values.sort(1)
    weights = weights.gather(1, order)
    mass, sums = (torch.nn.functional.pad(part.cumsum(1), (1, 0)) for part in (weights, weights * values))
    levels = _spread(values, weights, count)
    for _ in range(_STEPS):
        edges = torch.searchsorted(values, (levels[:, 1:] + levels[:, :-1]) / 2)
        edges = torch.nn.functional.pad(edges, (1, 1))
        edges[:, -1] = values.shape[1]
        inside = mass.gather(1, edges).diff()
        means = torch.where(inside > 0, sums.gather(1, edges).diff() / inside.clamp(min=_TINY), levels)
        means = means.cummax(1).values  # differences of sums are rounded: entries stay in order
        if torch.equal(means, levels):
            break
        levels = means
    return levels


def _spread(values: Tensor, weights: Tensor, count: int) -> Tensor:
    """Return levels as dense as the cube root of what is there, which is best of many (Panter and Dite 1951)."""
    low, width = values[:, :1], (values[:, -1:] - values[:, :1]) / _BINS
    bins = ((values - low) / width.clamp(min=_TINY)).long().clamp_(max=_BINS - 1)
    density = values.new_zeros(len(values), _BINS).scatter_add_(1, bins, weights).pow_(1 / 3)
    share = torch.nn.functional.pad(density.cumsum(1), (1, 0))
    wanted = (torch.arange(count, dtype=values.dtype) + 0.5) / count * share[:, -1:]
    at = torch.searchsorted(share, wanted).clamp_(1, _BINS)
    below, above = share.gather(1, at - 1), share.gather(1, at)
    return low + (at - 1 + (wanted - below) / (above - below).clamp(min=_TINY)) * width


def _centroids(vectors: Tensor, weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    table = _far_apart(vectors, weights, count, generator)
    for _ in range(_VECTOR_STEPS):
        codes = _closest(vectors, weights, table)
        mass, sums = (
            torch.zeros(table.shape, dtype=torch.float64).index_add_(0, codes, part.double())
            for part in (weights, weights * vectors)
        )
        moved = torch.where(mass > 0, sums / mass.clamp(min=_TINY), table).float()
        if torch.equal(moved, table):
            break
        table = moved
    return table


def _far_apart(vectors: Tensor, weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw entries one after another, each among vectors that are far from those before."""
    table = torch.zeros(count, vectors.shape[1])
    left = torch.ones(len(vectors))
    columns, counts = vectors.T.contiguous(), weights.T.contiguous()  # sums over few are slow along rows
    for index in range(count):
        share = left.double().cumsum(0)
        drawn = torch.rand((), dtype=torch.float64, generator=generator) * share[-1]
        table[index] = vectors[int(torch.searchsorted(share, drawn, right=True).clamp_(max=len(vectors) - 1))]
        distance = ((columns - table[index].unsqueeze(1)).square() * counts).sum(0)
        left = torch.minimum(left, distance) if index else distance
    return table
