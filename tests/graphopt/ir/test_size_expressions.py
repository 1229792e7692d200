"""Sizes in words: what is written of a trace's is read again, and nothing else that a file says is computed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.ir.size_expressions import Linear, evaluate, is_expression, linear, names_in, printed
from graphopt.ir.torch_internals import FakeTensorMode, ShapeEnv

Size = Callable[[Mapping[str, Any]], Any]
OPERATORS = (operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod)


@pytest.mark.parametrize(
    ("expression", "value"),
    [("batch", 3), ("2*batch", 6), ("batch//2+1", 2), ("(batch+1)%3", 1), ("rows*batch", None), ("f(batch)", None)],
)
def test_values(expression: str, value: int | None) -> None:
    assert evaluate(expression, {"batch": 3}) == value


@pytest.mark.parametrize(
    "text",
    [
        *("batch size", "10", "x//0", "x//y", "1e5", "-x", "x\0", "(" * 300, "x+1" * 100),
        *("x#y", "x\n", "x**y", "x if y else z", "[x]", "x.y", "x:=1", "x\x1b[2J"),
    ],
)
def test_what_is_no_expression_is_a_name(text: str) -> None:
    assert not is_expression(text)
    assert (names_in(text), evaluate(text, {}), evaluate(text, {text: 3})) == ((text,), None, 3)


def test_names_that_python_has_are_names() -> None:
    assert names_in("2*class+lambda") == ("class", "lambda")
    assert evaluate("2*class+True", {"class": 3, "True": 5}) == 11


@pytest.mark.parametrize(
    ("expression", "line"),
    [
        *(("b", ("b", 1, 0)), ("2*b", ("b", 2, 0)), ("b+b+1", ("b", 2, 1)), ("3*(b-2)*2", ("b", 6, -12))),
        *(("100-b", ("b", -1, 100)), ("b//2", None), ("b%8", None), ("b*b", None), ("a+b", None), ("b-b", None)),
    ],
)
def test_sizes_that_grow_evenly(expression: str, line: tuple[str, int, int] | None) -> None:
    assert linear(expression) == (line and Linear(*line))


def _computed(function: Callable[[Any, Any], Any], left: Size, right: Size) -> Size:
    return lambda sizes: function(left(sizes), right(sizes))


def _number(value: int) -> Size:
    return lambda _: value


def _named(name: str) -> Size:
    return lambda sizes: sizes[name]


def _larger(parts: st.SearchStrategy[Size]) -> st.SearchStrategy[Size]:
    divided = st.builds(_computed, st.sampled_from(OPERATORS[3:]), parts, st.integers(1, 9).map(_number))
    return divided | st.builds(_computed, st.sampled_from(OPERATORS[:3]), parts, parts)


SIZES = st.recursive(
    st.sampled_from(["rows", "class"]).map(_named) | st.integers(0, 9).map(_number), _larger, max_leaves=8
)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(2, 50), st.integers(2, 50))
def test_what_is_written_of_a_trace_is_read_again(size: Size, rows: int, steps: int) -> None:
    fake = FakeTensorMode(shape_env=ShapeEnv()).from_tensor(torch.empty(7, 11), static_shapes=False)
    symbols = dict(zip(("rows", "class"), fake.shape, strict=True))
    found: Any = size(symbols)
    if not isinstance(found, torch.SymInt) or found.node.expr.is_number:
        return
    names = {one.node.expr: type(one.node.expr)(name) for name, one in symbols.items()}  # type: ignore[attr-defined]
    text = printed(found.node.expr.xreplace(names))
    sizes = {"rows": rows, "class": steps}
    assert text is not None
    assert evaluate(text, sizes) == size(sizes)
