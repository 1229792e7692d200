"""Unification of layouts: a union-find over axes whose roots may be bound to compound terms.

`unify(a, b)` records that two dimensions have the same positions in the same order. What may happen:

    axis ~ axis          they become one
    axis ~ compound      the axis becomes the compound: 768 becomes (12 x 64)
    product ~ product    walked from the innermost factor; the larger factor is split where divisible
    concat ~ concat      walked from the first segment; the longer segment is split at the boundary
    product ~ concat     the outermost factor is split at the boundaries; a boundary inside one of its
                         indices isolates that index and cuts the inner factors

Where no common refinement exists (2 x 3 against 3 x 2) the axes involved are frozen, with the reason. Every
split makes strictly smaller axes, so the process ends, and a bound axis can never occur in its own term.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import sympy  # type: ignore[import-untyped]

from graphopt.axes.layout import ONE, Axis, Concat, Layout, Product, Size, concat, describe, leaves, product, size


class Solver:
    """The state of one inference: parents and bindings of axes, and the reasons of the frozen ones."""

    def __init__(self) -> None:
        self._terms: dict[int, Layout] = {}  # axis id -> the term it has become
        self._resolved: dict[int, int] = {}  # axis id -> how many bindings its term was last resolved under
        self._frozen: dict[int, str] = {}
        self._count = 0

    def axis(self, length: Size, reason: str | None = None) -> Layout:
        """Return a new axis of the given size (`ONE` for 1), frozen if a reason is given."""
        if isinstance(length, int) and length == 1:
            return ONE
        self._count += 1
        if reason is not None:
            self._frozen[self._count] = reason
        return Axis(self._count, length)

    def resolve(self, layout: Layout) -> Layout:
        """Return the layout in terms of axes that are bound to nothing."""
        if isinstance(layout, Axis):
            term = self._terms.get(layout.id)
            if term is None:
                return layout
            if self._resolved.get(layout.id) == len(self._terms):
                return term
            resolved = self.resolve(term)
            self._terms[layout.id] = resolved
            self._resolved[layout.id] = len(self._terms)
            return resolved
        if isinstance(layout, Product):
            factors = [self.resolve(factor) for factor in layout.factors]
            same = all(new is old for new, old in zip(factors, layout.factors, strict=True))
            return layout if same else product(factors)
        segments = [self.resolve(segment) for segment in layout.segments]
        same = all(new is old for new, old in zip(segments, layout.segments, strict=True))
        return layout if same else concat(segments)

    def freeze(self, layout: Layout, reason: str) -> None:
        """Keep every axis of the layout whole; the first reason given to an axis stays."""
        for axis in leaves(self.resolve(layout)):
            self._frozen.setdefault(axis.id, reason)

    def reason(self, axis: Axis) -> str | None:
        """Return why an unbound axis must stay whole, or None if it is free."""
        if not isinstance(axis.size, int):
            return f"dynamic size {axis.size}"
        return self._frozen.get(axis.id)

    def unify(self, a: Layout, b: Layout, where: str) -> None:
        """Make two layouts of the same size the same; freeze what has no common refinement.

        Args:
            a: one layout.
            b: the other.
            where: the operator and node that ask for it, for the reason of a freeze.
        """
        a, b = self.resolve(a), self.resolve(b)
        if a == b:
            return
        if not equal(size(a), size(b)):
            self._clash(a, b, where)
        elif isinstance(a, Axis):
            self._bind(a, b)
        elif isinstance(b, Axis):
            self._bind(b, a)
        elif isinstance(a, Product) and isinstance(b, Product):
            self._products(a, b, where)
        elif isinstance(a, Concat) and isinstance(b, Concat):
            self._concats(a, b, where)
        elif isinstance(a, Product) and isinstance(b, Concat):
            self._product_concat(a, b, where)
        elif isinstance(a, Concat) and isinstance(b, Product):
            self._product_concat(b, a, where)

    def _bind(self, axis: Axis, term: Layout) -> None:
        if any(leaf.id == axis.id for leaf in leaves(term)):
            # Only sizes torch calls equal but we cannot compare get here: nothing smaller is known.
            self.freeze(term, "its size depends on itself")
            return
        self._terms[axis.id] = term
        reason = self._frozen.pop(axis.id, None)
        if reason is not None:
            self.freeze(term, reason)

    def _products(self, a: Product, b: Product, where: str) -> None:
        """Walk both products from the innermost factor, splitting the larger factor of each pair."""
        left, right = list(a.factors), list(b.factors)
        while left and right:
            f, g = self.resolve(left.pop()), self.resolve(right.pop())
            if isinstance(f, Product) or isinstance(g, Product):  # it was split meanwhile
                left.extend(f.factors if isinstance(f, Product) else (f,))
                right.extend(g.factors if isinstance(g, Product) else (g,))
                continue
            if equal(size(f), size(g)):
                self.unify(f, g, where)
            elif (ratio := _quotient(size(f), size(g))) is not None:
                left.append(self._split_off(f, ratio, g, where))
            elif (ratio := _quotient(size(g), size(f))) is not None:
                right.append(self._split_off(g, ratio, f, where))
            else:
                self._skip_clash(left, right, f, g, where)
        rest = left or right
        if rest:
            self._clash(product(rest), ONE, where)

    def _split_off(self, larger: Layout, ratio: Size, inner: Layout, where: str) -> Layout:
        outer = self.axis(ratio)
        self.unify(larger, product([outer, inner]), where)
        return outer

    def _skip_clash(self, left: list[Layout], right: list[Layout], f: Layout, g: Layout, where: str) -> None:
        """Freeze the shortest runs of factors of equal size that do not refine each other."""
        run_f, run_g = [f], [g]
        while not equal(size(product(run_f)), size(product(run_g))):
            if not left and not right:
                break
            shorter_left = left and (not right or _smaller(size(product(run_f)), size(product(run_g))))
            if shorter_left:
                run_f.insert(0, left.pop())
            else:
                run_g.insert(0, right.pop())
        self._clash(product(run_f), product(run_g), where)

    def _concats(self, a: Concat, b: Concat, where: str) -> None:
        """Walk both concats from the first segment, cutting the longer segment of each pair."""
        left, right = list(reversed(a.segments)), list(reversed(b.segments))
        while left and right:
            f, g = self.resolve(left.pop()), self.resolve(right.pop())
            if isinstance(f, Concat) or isinstance(g, Concat):  # it was cut meanwhile
                left.extend(reversed(f.segments) if isinstance(f, Concat) else (f,))
                right.extend(reversed(g.segments) if isinstance(g, Concat) else (g,))
                continue
            length, other = size(f), size(g)
            if equal(length, other):
                self.unify(f, g, where)
            elif not isinstance(length, int) or not isinstance(other, int):
                self._clash(concat([f, *left]), concat([g, *right]), where)
                return
            elif length > other:
                left.append(self._cut_after(f, g, length - other, where))
            else:
                right.append(self._cut_after(g, f, other - length, where))

    def _cut_after(self, longer: Layout, head: Layout, remaining: int, where: str) -> Layout:
        tail = self.axis(remaining)
        self.unify(longer, concat([head, tail]), where)
        return tail

    def _product_concat(self, a: Product, b: Concat, where: str) -> None:
        """Split the outermost factor of `a` at the boundaries of `b`, isolating indices a boundary cuts."""
        outer, inner = a.factors[0], product(a.factors[1:])
        width, count = size(inner), size(outer)
        lengths = [size(segment) for segment in b.segments]
        if not isinstance(width, int) or not isinstance(count, int):
            self._clash(a, b, where)
            return
        boundaries: list[int] = [0]
        for length in lengths:
            boundaries.append(boundaries[-1] + int(length))
        pieces = [self.axis(length) for length in _cuts(boundaries, width, count)]
        # A piece repeats `inner`, so cutting one piece cuts them all at the same place: that is the meaning.
        self.unify(outer, concat(pieces), where)
        self._concats(_as_concat([product([piece, inner]) for piece in pieces]), b, where)

    def _clash(self, a: Layout, b: Layout, where: str) -> None:
        reason = f"{describe(a)} and {describe(b)} have no common refinement at {where}"
        self.freeze(a, reason)
        self.freeze(b, reason)


def _as_concat(segments: Sequence[Layout]) -> Concat:
    """Keep a single segment a concat, so that it can be walked."""
    return Concat(tuple(segments))


def _cuts(boundaries: Sequence[int], width: int, count: int) -> list[int]:
    """Return lengths of pieces of range(count): each boundary falls between two or in one of length 1."""
    marks = {0, count}
    for boundary in boundaries:
        marks.add(boundary // width)
        marks.add(-(-boundary // width))
    ordered = sorted(marks)
    return [after - before for before, after in itertools.pairwise(ordered)]


def equal(a: Size, b: Size) -> bool:
    """Tell whether two sizes are the same for every value of their symbols."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(a == b) or sympy.expand(a - b) == 0


def _smaller(a: Size, b: Size) -> bool:
    return isinstance(a, int) and (not isinstance(b, int) or a < b)


def _quotient(a: Size, b: Size) -> Size | None:
    """Return a / b if it is a whole size greater than 1 for every value of the symbols, else None."""
    if isinstance(a, int):
        return a // b if isinstance(b, int) and a % b == 0 and a > b else None
    factor, rest = sympy.sympify(a).as_coeff_Mul()
    divisor, symbols = sympy.sympify(b).as_coeff_Mul()
    if not factor.is_Integer or not divisor.is_Integer or int(factor) % int(divisor) != 0:
        return None
    remaining = rest / symbols
    if sympy.denom(remaining) != 1:
        return None
    whole = (int(factor) // int(divisor)) * remaining
    return int(whole) if whole.is_Integer else whole
