"""Sizes of dynamic axes: which an axis may have, and what an expression ("2*batch") is at some size."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


@dataclass(frozen=True, slots=True)
class SizeRange:
    """Which sizes a dynamic axis may have, both ends included; no `most`: as large as memory is."""

    least: int = 0
    most: int | None = None

    def __contains__(self, size: int) -> bool:
        """Whether it is one of them."""
        return self.least <= size and (self.most is None or size <= self.most)

    def __and__(self, other: SizeRange) -> SizeRange:
        """Return those of both."""
        ends = [end for end in (self.most, other.most) if end is not None]
        return SizeRange(max(self.least, other.least), min(ends, default=None))

    def __str__(self) -> str:
        """Say it: "4 to 8", "4 or more", "at most 8", "any"."""
        if self.most is None:
            return f"{self.least} or more" if self.least else "any"
        if not self.least:
            return f"at most {self.most}"
        return f"{self.least} to {self.most}" if self.least < self.most else f"{self.least}"

    def nearest(self, size: int) -> int:
        """Return the size in range that is nearest to `size`."""
        return max(self.least, size if self.most is None else min(size, self.most))


ANY = SizeRange()


def evaluate(expression: str, sizes: Mapping[str, Any]) -> Any:
    """Return the value of a size expression ("2*batch"), None if it depends on a name without a size."""
    return _value(ast.parse(expression, mode="eval").body, sizes)


def _value(node: ast.expr, sizes: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return sizes.get(node.id)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left, sizes), _value(node.right, sizes)
        return None if left is None or right is None else _OPERATORS[type(node.op)](left, right)
    return None
