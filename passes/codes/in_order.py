"""Chooses codes column after column, so that what is not chosen yet makes up for what was: GPTQ with tables (GPTVQ).

van Baalen et al. 2024, "GPTVQ: The Blessing of Dimensionality for LLM Quantization". Entries and scales are chosen
before; scales are fitted again to what came of it, by what inputs have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graphopt.passes.codes.clusters import nearest
from graphopt.passes.codes.coded import Coded, Form, positive, runs
from graphopt.passes.layers.gptq import InOrder

_DAMPING = 0.01
_AT_ONCE = 1 << 20  # numbers of rows that are gone through together, column after column


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a weight is multiplied with.

    Attributes:
        squares: E[x^2] at each number of the weight, (rows, columns), of any unit.
        moments: E[x x^T] of each group of outputs, (columns, columns) float64, of that unit; none where that takes too
            much memory.
    """

    squares: Tensor
    moments: Sequence[Tensor]


def choose_codes(matrix: Tensor, coded: Coded, form: Form, inputs: Inputs) -> Coded:
    """Choose the codes of a weight anew.

    Args:
        matrix: (rows, columns) float32.
        coded: what entries and scales are taken of.
        form: how it is stored.
        inputs: what it is multiplied with.
    """
    if not inputs.moments:
        return coded
    step, padding = len(matrix) // len(inputs.moments), -matrix.shape[1] % form.vector
    parts, scales = [], []
    for index, moments in enumerate(inputs.moments):
        shared = torch.nn.functional.pad(moments, (0, padding, 0, padding))
        in_order = InOrder(shared, _DAMPING, form.vector)
        for run in runs(step, matrix.shape[1], at_once=_AT_ONCE):
            rows = slice(index * step + run.start, index * step + run.stop)
            part = _Rows(coded, form, rows, inputs.squares[rows])
            padded = torch.nn.functional.pad(matrix[rows], (0, padding))
            codes = in_order.choose(padded, part.nearest).long()
            parts.append(codes.to(torch.uint8))
            scales.append(_fitted(padded, part.entries(codes), shared, part.scale))
    return replace(coded, codes=torch.cat(parts), scale=None if coded.scale is None else torch.cat(scales))


class _Rows:
    """Rows of a weight with their tables and scales."""

    def __init__(self, coded: Coded, form: Form, rows: slice, squares: Tensor) -> None:
        tables = coded.table.reshape(-1, form.entries, form.vector)
        which = (coded.first(form)[rows, 0] // form.entries).clamp(max=len(tables) - 1)
        self._vector = form.vector
        self._squares = torch.nn.functional.pad(squares, (0, -squares.shape[1] % form.vector))
        self.scale = torch.ones(len(squares), 1) if coded.scale is None else coded.scale[rows]
        if form.vector == 1:  # a table for each row
            self._tables, self._counts = tables[which], [1] * len(which)
        else:
            used, counts = torch.unique_consecutive(which, return_counts=True)
            self._tables, self._counts = tables[used], counts.tolist()

    def nearest(self, values: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the entries that are closest to some columns, see `gptq.Nearest`."""
        scaled = values / torch.where(self.scale > 0, self.scale, 1.0)
        weights = self._squares[:, columns]
        if self._vector == 1:
            codes = nearest(scaled.unsqueeze(1), weights.unsqueeze(1), self._tables)
        else:
            parts = (torch.split(part, self._counts) for part in (scaled, weights))
            triples = zip(*parts, self._tables, strict=True)
            codes = torch.cat([nearest(x[None], w[None], table[None])[0] for x, w, table in triples]).unsqueeze(1)
        return codes, self.entries(codes) * self.scale

    def entries(self, codes: Tensor) -> Tensor:
        """Return the entries of codes (rows, vectors), one after another in each row."""
        if self._vector == 1:
            return self._tables[..., 0].gather(1, codes)
        parts = zip(torch.split(codes, self._counts), self._tables, strict=True)
        return torch.cat([table[part].flatten(1) for part, table in parts])


def _fitted(matrix: Tensor, entries: Tensor, moments: Tensor, scale: Tensor) -> Tensor:
    """Return the scales with which products come closest, the old ones where that says nothing."""
    met = entries.double() @ moments
    power, found = (met * entries).sum(1, keepdim=True), (met * matrix).sum(1, keepdim=True)
    known = (power > 0) & (found > 0)
    return torch.where(known, positive((found / torch.where(power > 0, power, 1.0)).float()), scale)
