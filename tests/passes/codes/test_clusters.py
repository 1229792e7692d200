"""Entries that come closest to numbers and vectors."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from graphopt.passes.codes.clusters import cluster, drawn, nearest


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def error(vectors: Tensor, weights: Tensor, tables: Tensor) -> Tensor:
    """Return the weighted squared error of each table."""
    codes = nearest(vectors, weights, tables)
    found = tables.gather(1, codes.unsqueeze(2).expand(*codes.shape, tables.shape[2]))
    return (weights * (vectors - found).square()).sum((1, 2))


def best_of_intervals(values: Tensor, weights: Tensor, count: int) -> float:
    """Return the least error of any clusters of numbers, which are intervals."""
    order = values.argsort()
    values, weights = values[order], weights[order]
    found = []
    for inner in itertools.combinations(range(1, len(values)), count - 1):
        edges, total = (0, *inner, len(values)), 0.0
        for start, stop in itertools.pairwise(edges):
            part, counts = values[start:stop], weights[start:stop]
            total += float((counts * (part - (counts * part).sum() / counts.sum()).square()).sum())
        found.append(total)
    return min(found)


@pytest.mark.parametrize("weighted", [False, True])
def test_numbers_are_nearly_as_close_as_they_can_be(weighted: bool) -> None:
    values = torch.randn(12, 11, 1, generator=generator())
    weights = torch.rand(12, 11, 1, generator=generator()) + 0.1 if weighted else torch.ones(12, 11, 1)
    found = error(values, weights, cluster(values, weights, 4, generator()))
    best = torch.tensor([best_of_intervals(v[:, 0], w[:, 0], 4) for v, w in zip(values, weights, strict=True)])
    assert bool((found > best * (1 - 1e-5)).all())
    assert float((found / best).median()) < 1.1


@pytest.mark.parametrize("size", [1, 3])
def test_few_different_vectors_are_kept_as_they_are(size: int) -> None:
    kinds = torch.randn(5, size, generator=generator())
    vectors = kinds[torch.randint(5, (1, 400), generator=generator())]
    table = cluster(vectors, torch.ones_like(vectors), 16, generator())
    assert float(error(vectors, torch.ones_like(vectors), table)) < 1e-10


@pytest.mark.parametrize("size", [1, 4])
def test_entries_are_the_means_of_what_is_closest(size: int) -> None:
    vectors = torch.randn(2, 300, size, generator=generator())
    weights = torch.rand(2, 300, size, generator=generator())
    tables = cluster(vectors, weights, 8, generator())
    codes = nearest(vectors, weights, tables)
    distances = (weights.unsqueeze(2) * (vectors.unsqueeze(2) - tables.unsqueeze(1)).square()).sum(3)
    chosen = distances.gather(2, codes.unsqueeze(2))[..., 0]
    torch.testing.assert_close(chosen, distances.min(2).values)
    for entry in range(8):
        inside = (codes == entry).unsqueeze(2) * weights
        means = (inside * vectors).sum(1) / inside.sum(1)
        torch.testing.assert_close(means, tables[:, entry], atol=0.02, rtol=0.0)  # of steps that are few


def test_an_outlier_and_equal_numbers_have_an_entry() -> None:
    values = torch.zeros(2, 100, 1)
    values[1, 3] = 1e6
    tables = cluster(values, torch.ones_like(values), 16, generator())
    assert bool(torch.isfinite(tables).all())
    assert error(values, torch.ones_like(values), tables).tolist() == [0.0, 0.0]


def test_what_counts_nothing_moves_nothing() -> None:
    values = torch.tensor([1.0, 1.0, 2.0, 2.0, 90.0]).reshape(1, 5, 1)
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]).reshape(1, 5, 1)
    table = cluster(values, weights, 2, generator())
    assert error(values[:, :4], weights[:, :4], table).item() == pytest.approx(0.0, abs=1e-10)


def test_many_vectors_are_sampled_and_the_seed_decides() -> None:
    found = [drawn(2000, 4, 2, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert len(found[0]) < 2000
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert drawn(20, 4, 2, generator()).tolist() == list(range(20))
