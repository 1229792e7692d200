"""Chooses the entries of tables, and which of them stands for each part of a weight.

    w (rows, columns)    ->    table[codes] * scale        columns in vectors, the last filled up with zeros

Rows that share a table have scales of their own: norms that were folded leave rows of one layer unequal by far. Scales
and entries are fitted in turn. Where inputs are known, the squared error of a number counts E[x^2] of what it meets (as
in SqueezeLLM, Kim et al. 2023), and codes are chosen in order (`in_order`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from graphopt.passes.codes.clusters import cluster, drawn, nearest
from graphopt.passes.codes.coded import SMALLEST, Coded, Form, positive, runs
from graphopt.passes.codes.in_order import Inputs, choose_codes
from graphopt.passes.codes.signs import SIGNS, binary, ternary

_TURNS = 3
_ELEMENTS = 1 << 22  # of rows whose tables are fitted at once


def encode(matrix: Tensor, form: Form, inputs: Inputs | None, generator: torch.Generator) -> Coded:
    """Choose codes, entries and scales of a weight.

    Args:
        matrix: (rows, columns) float32, finite.
        form: how it is stored.
        inputs: what it is multiplied with; None if nothing is known, and every error counts the same.
        generator: of k-means.
    """
    if inputs is None:
        return _chosen(matrix, form, torch.ones(1).expand(matrix.shape), generator)
    return choose_codes(matrix, _chosen(matrix, form, inputs.squares, generator), form, inputs)


def _chosen(matrix: Tensor, form: Form, weights: Tensor, generator: torch.Generator) -> Coded:
    if form.codes != "kmeans":
        signs = binary if form.codes == "binary" else ternary
        found = [signs(matrix[run], weights[run]) for run in runs(len(matrix), matrix.shape[1])]
        scale = positive(torch.cat([scale for _, scale in found])).float()
        return Coded(torch.cat([codes for codes, _ in found]), torch.tensor(SIGNS[form.codes]).unsqueeze(1), scale)
    at_once = form.group * max(1, _ELEMENTS // max(1, form.group * matrix.shape[1]))
    parts = [
        _clustered(rows, counts, form, generator)
        for rows, counts in zip(torch.split(matrix, at_once), torch.split(weights, at_once), strict=True)
    ]
    return Coded(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.table for part in parts]),
        torch.cat([part.scale for part in parts if part.scale is not None]) if form.scaled else None,
    )


def _clustered(matrix: Tensor, weights: Tensor, form: Form, generator: torch.Generator) -> Coded:
    """Cluster rows of whole groups, one after another where the last group is smaller."""
    whole = len(matrix) // form.group * form.group
    if 0 < whole < len(matrix):
        one, other = (
            _clustered(matrix[rows], weights[rows], form, generator) for rows in (slice(whole), slice(whole, None))
        )
        scale = None if one.scale is None or other.scale is None else torch.cat([one.scale, other.scale])
        return Coded(torch.cat([one.codes, other.codes]), torch.cat([one.table, other.table]), scale)
    group = min(form.group, len(matrix))
    parts = list(runs(len(matrix), matrix.shape[1], group=group))
    scale = torch.ones(len(matrix), 1)
    if form.scaled:
        scale = torch.cat([positive(_roots(matrix[run], weights[run])) for run in parts])
    for _ in range(_TURNS if form.scaled else 1):
        table = cluster(*_sample(matrix, weights, scale, group, form, generator), form.entries, generator)
        of_run = (table[run.start // group : -(-run.stop // group)] for run in parts)
        found = [_nearest(matrix[run], weights[run], scale[run], own) for run, own in zip(parts, of_run, strict=True)]
        if form.scaled:
            scale = torch.cat([fitted for _, fitted in found])
    return Coded(torch.cat([codes for codes, _ in found]), table.flatten(0, 1), scale if form.scaled else None)


def _sample(
    matrix: Tensor, weights: Tensor, scale: Tensor, group: int, form: Form, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return vectors of each group in units of their scales, (tables, vectors, size), and what they count."""
    vectors = math.ceil(matrix.shape[1] / form.vector)  # of a row
    numbers = drawn(group * vectors, form.entries, form.vector, generator).unsqueeze(1)
    rows = torch.arange(0, len(matrix), group).reshape(-1, 1, 1) + numbers // vectors
    columns = numbers % vectors * form.vector + torch.arange(form.vector)
    inside = columns < matrix.shape[1]  # the last of a row is filled up with zeros
    columns = columns.clamp(max=matrix.shape[1] - 1)
    units, counted = torch.where(scale > 0, scale, 1.0), (scale / scale.max().clamp(min=SMALLEST)).square()
    return (
        torch.where(inside, matrix[rows, columns] / units[rows, 0], 0.0),
        torch.where(inside, weights[rows, columns] * counted[rows, 0], 0.0),
    )


def _nearest(matrix: Tensor, weights: Tensor, scale: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes of rows, (rows, vectors) uint8, and the scales with which they come closest, (rows, 1)."""
    tables, _, size = table.shape
    scaled = matrix / torch.where(scale > 0, scale, 1.0)
    codes = nearest(_in_vectors(scaled, size, tables), _in_vectors(weights, size, tables), table)
    values = table.gather(1, codes.unsqueeze(2).expand(-1, -1, size)).reshape(len(matrix), -1)[:, : matrix.shape[1]]
    return codes.reshape(len(matrix), -1).to(torch.uint8), positive(_fitted(matrix, values, weights))


def _in_vectors(matrix: Tensor, size: int, tables: int) -> Tensor:
    """Return (tables, vectors, size) of rows that are filled up with zeros."""
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % size)).reshape(tables, -1, size)


def _roots(matrix: Tensor, weights: Tensor) -> Tensor:
    """Return the root of the mean square of each row, (rows, 1) float32."""
    counted = weights.sum(1, keepdim=True, dtype=torch.float64)
    squares = (matrix.double().square() * weights).sum(1, keepdim=True)
    return torch.where(counted > 0, squares / counted.clamp(min=1e-300), 0.0).sqrt().float()


def _fitted(matrix: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    """Return the scale of each row with which `values` come closest to it, (rows, 1) float32."""
    counted = weights * values.double()
    power = (counted * values).sum(1, keepdim=True)
    return torch.where(power > 0, (counted * matrix).sum(1, keepdim=True) / power.clamp(min=1e-300), 0.0).float()
