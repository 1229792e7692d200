"""Sizes of dynamic axes: which an axis may have, and what an expression ("2*batch") is at some size."""

from __future__ import annotations

import ast
import functools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_DIVISIONS = (ast.FloorDiv, ast.Mod)
_NAME = re.compile(r"(?<!\w)[^\W\d]\w*")
_LONGEST = 256  # characters of an expression; what is longer is a name
MOST_AT_LEAST = 1 << 20  # that the smallest size of an axis may be in a file: inputs are made up of it


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


def names_in(expression: str) -> tuple[str, ...]:
    """Return the names that a size depends on ("2*batch"); what is no expression is a name itself ("batch size")."""
    return _parsed(expression)[0]


def evaluate(expression: str, sizes: Mapping[str, Any]) -> Any:
    """Return the value of a size expression ("2*batch"), None if it depends on a name without a size."""
    if expression in sizes:
        return sizes[expression]
    names, tree = _parsed(expression)
    known = [sizes.get(name) for name in names]
    return None if tree is None or any(size is None for size in known) else _value(tree, known)


@functools.lru_cache(maxsize=1024)
def _parsed(text: str) -> tuple[tuple[str, ...], ast.expr | None]:
    """Take an expression apart: names, and a tree in which they are `_0`, `_1`; they may be Python's own (`class`)."""
    names = tuple(dict.fromkeys(_NAME.findall(text)))
    if not names or len(text) > _LONGEST:
        return (text,), None
    try:
        tree = ast.parse(_NAME.sub(lambda match: f"_{names.index(match[0])}", text), mode="eval").body
    except (SyntaxError, ValueError):  # the second of a null character (Python 3.11)
        return (text,), None
    return (names, tree) if _is_size(tree) else ((text,), None)


def _is_size(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        divisor = not isinstance(node.op, _DIVISIONS) or (isinstance(node.right, ast.Constant) and node.right.value)
        return bool(divisor) and _is_size(node.left) and _is_size(node.right)
    return isinstance(node, ast.Name) or (isinstance(node, ast.Constant) and type(node.value) is int)


def _value(node: ast.expr, sizes: Sequence[Any]) -> Any:
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left, sizes), _value(node.right, sizes))
    return sizes[int(node.id[1:])] if isinstance(node, ast.Name) else node.value  # type: ignore[attr-defined]
