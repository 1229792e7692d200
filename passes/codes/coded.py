"""How a weight is stored as codes, and one that is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = 1e-30  # rows of smaller weights are stored as zeros: scales stay normal float32 numbers
_AT_ONCE = 1 << 18  # numbers of a weight that are worked on, in double precision and int64


@dataclass(frozen=True, slots=True)
class Form:
    """How a weight is stored.

    Attributes:
        codes: "kmeans", "binary" or "ternary".
        entries: of a table.
        vector: columns of an entry.
        group: rows that share a table.
    """

    codes: str
    entries: int
    vector: int
    group: int

    @property
    def scaled(self) -> bool:
        """Whether rows have scales of their own."""
        return self.group > 1 or self.codes != "kmeans"


@dataclass(frozen=True, eq=False)
class Coded:
    """A weight as codes.

    Attributes:
        codes: (rows, vectors) uint8, numbers of entries in the table of a row.
        table: (tables * entries, vector) float32.
        scale: (rows, 1) float32, None where rows have none.
    """

    codes: Tensor
    table: Tensor
    scale: Tensor | None

    def first(self, form: Form) -> Tensor:
        """Return where in `table` that of each row begins, (rows, 1)."""
        return torch.arange(len(self.codes)).unsqueeze(1) // form.group * form.entries

    def reals(self, form: Form, columns: int, rows: slice = slice(None)) -> Tensor:
        """Return what is stored of some rows as numbers, (rows, columns) float32."""
        values = self.table[self.codes[rows] + self.first(form)[rows]].flatten(1)[:, :columns]
        return values if self.scale is None else values * self.scale[rows]


def runs(rows: int, columns: int, *, group: int = 1, at_once: int | None = None) -> Iterator[slice]:
    """Take a weight apart into runs of rows, of whole groups or inside of one, that are worked on one at a time."""
    step = max(1, (at_once or _AT_ONCE) // max(1, columns))
    together = max(group, step // group * group)
    for first in range(0, rows, together):
        last = min(first + together, rows)
        yield from (slice(start, min(start + step, last)) for start in range(first, last, step))


def positive(scale: Tensor) -> Tensor:
    """Return scales of which the smallest are 0."""
    return torch.where(scale > SMALLEST, scale, 0.0)
