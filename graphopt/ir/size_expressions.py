"""Sizes of dynamic axes in words: "batch", "2*batch", "(batch+1)//2".

They are Python's sums, differences, products, quotients and remainders of names and whole numbers, divided by numbers
alone, so that whatever a file says is soon computed. What is no such expression is a name itself ("batch size").
"""

from __future__ import annotations

import ast
import functools
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_DIVISIONS: dict[str, ast.operator] = {  # by the names of torch's classes
    "FloorDiv": ast.FloorDiv(),
    "CleanDiv": ast.FloorDiv(),
    "Mod": ast.Mod(),
    "PythonMod": ast.Mod(),
}
_NAME = re.compile(r"(?<!\w)[^\W\d]\w*")
_TEXT = re.compile(r"[\w +\-*/%()]{1,256}")
_HIGHEST_POWER = 64  # longer than a text may be as a product


class Linear(NamedTuple):
    """A size that is `factor * name + offset`."""

    name: str
    factor: int
    offset: int


def printed(expression: Any) -> str | None:
    """Write a symbolic size of torch's (sympy's) as an expression; None where it is none."""
    try:
        text = ast.unparse(_tree(expression)).replace(" ", "")
    except ValueError:
        return None
    return text if is_expression(text) else None


def is_expression(text: str) -> bool:
    """Whether a text is an expression of names and numbers, a name among them."""
    return _parsed(text)[1] is not None


def names_in(expression: str) -> tuple[str, ...]:
    """Return the names that a size depends on."""
    return _parsed(expression)[0]


def evaluate(expression: str, sizes: Mapping[str, int]) -> int | None:
    """Return the value of a size expression, None if it depends on a name without a size."""
    if expression in sizes:
        return sizes[expression]
    names, tree = _parsed(expression)
    known = [sizes[name] for name in names if name in sizes]
    return None if tree is None or len(known) < len(names) else _value(tree, known)


def linear(expression: str) -> Linear | None:
    """Return a size that grows or shrinks evenly with one name; None for any other."""
    names, tree = _parsed(expression)
    if len(names) != 1:
        return None
    factor, offset = (0, 0) if tree is None else _line(tree) or (0, 0)
    return Linear(names[0], factor, offset) if factor else None


def values_of_names(sizes: Iterable[tuple[int | str, int]]) -> dict[str, int]:
    """Return the value that each name has where expressions have sizes; it may stand in multiples alone ("2*n")."""
    found: dict[str, int] = {}
    for expression, size in sizes:
        if isinstance(expression, str) and (line := linear(expression)):
            found.setdefault(line.name, (size - line.offset) // line.factor)
    return found


@functools.lru_cache(maxsize=1024)
def _parsed(text: str) -> tuple[tuple[str, ...], ast.expr | None]:
    """Take an expression apart: names, and a tree in which they are `_0`, `_1`; they may be Python's own (`class`)."""
    names = tuple(dict.fromkeys(_NAME.findall(text)))
    if not names or not _TEXT.fullmatch(text):
        return (text,), None
    try:
        tree = ast.parse(_NAME.sub(lambda match: f"_{names.index(match[0])}", text), mode="eval").body
    except SyntaxError:
        return (text,), None
    return (names, tree) if _is_size(tree) else ((text,), None)


def _is_size(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        divides = isinstance(node.op, ast.FloorDiv | ast.Mod)
        divisor = not divides or (isinstance(node.right, ast.Constant) and node.right.value)
        return bool(divisor) and _is_size(node.left) and _is_size(node.right)
    return isinstance(node, ast.Name) or (isinstance(node, ast.Constant) and type(node.value) is int)


def _value(node: ast.expr, sizes: Sequence[int]) -> int:
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left, sizes), _value(node.right, sizes))
    return sizes[int(node.id[1:])] if isinstance(node, ast.Name) else node.value  # type: ignore[attr-defined]


def _line(node: ast.expr) -> tuple[int, int] | None:
    """Return factor and offset of a tree with one name."""
    if not isinstance(node, ast.BinOp):
        return (1, 0) if isinstance(node, ast.Name) else (0, _value(node, ()))
    left, right = _line(node.left), _line(node.right)
    if left is None or right is None:
        return None
    if isinstance(node.op, ast.Add | ast.Sub):
        compute = _OPERATORS[type(node.op)]
        return compute(left[0], right[0]), compute(left[1], right[1])
    if isinstance(node.op, ast.Mult) and 0 in (left[0], right[0]):
        return left[0] * right[1] + left[1] * right[0], left[1] * right[1]
    return None


def _tree(expression: Any) -> ast.expr:
    """Return an expression of sympy's as Python's.

    Raises:
        ValueError: it holds another operation.
    """
    if expression.is_Symbol:
        return ast.Name(str(expression))
    if not expression.is_Add and expression.could_extract_minus_sign():
        return ast.BinOp(ast.Constant(0), ast.Sub(), _tree(-expression))
    if expression.is_Integer:
        return ast.Constant(int(expression))
    if expression.is_Add:
        first, *terms = sorted(expression.as_ordered_terms(), key=lambda term: bool(term.could_extract_minus_sign()))
        return functools.reduce(_added, terms, _tree(first))
    if expression.is_Mul:
        return _product(expression.as_ordered_factors())
    if expression.is_Pow and expression.exp.is_Integer and 1 < expression.exp <= _HIGHEST_POWER:
        return _product([expression.base] * int(expression.exp))
    division = _DIVISIONS.get(type(expression).__name__)
    if division is None:
        raise ValueError(f"{expression} is no size that can be written")
    number, divisor = expression.args
    return ast.BinOp(_tree(number), division, _tree(divisor))


def _added(tree: ast.expr, term: Any) -> ast.expr:
    negative = term.could_extract_minus_sign()
    return ast.BinOp(tree, ast.Sub() if negative else ast.Add(), _tree(-term if negative else term))


def _product(factors: Sequence[Any]) -> ast.expr:
    return functools.reduce(lambda left, right: ast.BinOp(left, ast.Mult(), right), map(_tree, factors))
