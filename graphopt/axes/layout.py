"""Layouts: what one dimension of one tensor is made of, as a term over axes.

    layout := Axis                  an indivisible index range: the unit of removal
            | Product(l1, .., lk)   row-major flattening, outermost first: heads x head_dim
            | Concat(l1, .., lk)    segments side by side: what cat makes and split, chunk, slice take apart

A dimension of size 1 is `ONE`, the empty product: it is never removed and never unified, which is what
broadcasting needs. Terms are immutable and hashable. Build compound terms with `product` and `concat`, which
keep them in normal form: no product directly in a product, no concat directly in a concat, no unit factor,
no single operand.

Sizes are ints, or sympy expressions where torch has a symbolic size; a symbolic axis is never removed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import sympy  # type: ignore[import-untyped]
import torch

Size: TypeAlias = int | sympy.Expr


@dataclass(frozen=True, slots=True)
class Axis:
    """An indivisible index range; two dimensions carry the same axis iff their positions must go together."""

    id: int
    size: Size
    # Why it must stay whole, or None if it is free. Known once solving is done; not part of the identity.
    frozen: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Product:
    """Row-major flattening of its factors, outermost first; no factors: a dimension of size 1."""

    factors: tuple[Layout, ...]


@dataclass(frozen=True, slots=True)
class Concat:
    """Segments side by side, in order."""

    segments: tuple[Layout, ...]


Layout: TypeAlias = Axis | Product | Concat
Dims: TypeAlias = tuple[Layout, ...]  # of the dimensions of one tensor

ONE = Product(())


def product(factors: Iterable[Layout]) -> Layout:
    """Flatten factors, outermost first, into one normal-form layout."""
    flat: list[Layout] = []
    for factor in factors:
        if isinstance(factor, Product):
            flat.extend(factor.factors)
        else:
            flat.append(factor)
    return flat[0] if len(flat) == 1 else Product(tuple(flat))


def concat(segments: Iterable[Layout]) -> Layout:
    """Put segments side by side as one normal-form layout.

    Raises:
        ValueError: there are no segments.
    """
    flat: list[Layout] = []
    for segment in segments:
        if isinstance(segment, Concat):
            flat.extend(segment.segments)
        else:
            flat.append(segment)
    if not flat:
        raise ValueError("a concat needs at least one segment")
    return flat[0] if len(flat) == 1 else Concat(tuple(flat))


def size(layout: Layout) -> Size:
    """Return how many positions a dimension with this layout has."""
    if isinstance(layout, Axis):
        return layout.size
    if isinstance(layout, Product):
        return math.prod(size(factor) for factor in layout.factors)
    return sum(size(segment) for segment in layout.segments)


def leaves(layout: Layout) -> Iterator[Axis]:
    """Yield every axis of a layout in order of position, repeats included."""
    if isinstance(layout, Axis):
        yield layout
        return
    for part in layout.factors if isinstance(layout, Product) else layout.segments:
        yield from leaves(part)


def touches(layout: Layout, kept: Mapping[int, Sequence[int]]) -> bool:
    """Tell whether any axis of the layout has an entry in `kept`."""
    return any(axis.id in kept for axis in leaves(layout))


def surviving(layout: Layout, kept: Mapping[int, Sequence[int]]) -> Sequence[int]:
    """Return the sorted positions of a dimension that remain when each axis keeps only the given indices.

    Args:
        layout: the dimension's layout, of static size.
        kept: for each axis id the sorted indices it keeps; an axis that is absent keeps all.

    Raises:
        ValueError: the layout has a symbolic size.
    """
    if not touches(layout, kept):
        return range(_static(size(layout)))
    if isinstance(layout, Axis):
        return kept[layout.id]
    if isinstance(layout, Product):
        positions: Sequence[int] = (0,)
        for factor in layout.factors:
            width, inner = _static(size(factor)), surviving(factor, kept)
            positions = [outer * width + index for outer in positions for index in inner]
        return positions
    remaining: list[int] = []
    start = 0
    for segment in layout.segments:
        remaining.extend(start + index for index in surviving(segment, kept))
        start += _static(size(segment))
    return remaining


def surviving_size(layout: Layout, kept: Mapping[int, Sequence[int]]) -> Size:
    """Return the size a dimension has after removal; symbolic where the layout has symbolic axes."""
    if isinstance(layout, Axis):
        return len(kept[layout.id]) if layout.id in kept else layout.size
    if isinstance(layout, Product):
        return math.prod(surviving_size(factor, kept) for factor in layout.factors)
    return sum(surviving_size(segment, kept) for segment in layout.segments)


def describe(layout: Layout) -> str:
    """Render a layout for messages: `(12 x 64)`, `[64 | 32 | 32]`."""
    if isinstance(layout, Axis):
        return str(layout.size)
    if isinstance(layout, Product):
        return f"({' x '.join(map(describe, layout.factors))})" if layout.factors else "1"
    return f"[{' | '.join(map(describe, layout.segments))}]"


def _static(value: Size) -> int:
    if not isinstance(value, int):
        raise ValueError(f"the size {value} is symbolic, so its positions cannot be listed")
    return value


def shape_of(value: torch.Tensor) -> tuple[Size, ...]:
    """Return the sizes of a fake tensor, symbolic ones as sympy expressions."""
    return tuple(to_size(length) for length in value.shape)


def to_size(length: int | torch.SymInt) -> Size:
    """Return a torch size as an int, or as the sympy expression behind it."""
    if isinstance(length, int):
        return length
    expression = length.node.expr
    return int(expression) if expression.is_Integer else expression
