"""What dynamic axes are called, and which sizes they may have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from graphopt.capturing.tied_axes import TiedAxis
from graphopt.ir.dynamic_axes import LeafShapes
from graphopt.ir.names import Names
from graphopt.ir.signature import Dimension
from graphopt.ir.size_expressions import Linear, linear, printed
from graphopt.ir.sizes import ANY, SizeRange
from graphopt.ir.torch_internals import range_asked, range_of


class AxisNames:
    """Names for the symbols of dynamic axes, each of its own: equal names are equal sizes.

    The user's `Dim` names come first. Of what has none, a first axis is "batch" (the next one "batch_1"), and others
    are called after their input and axis ("x_2").

    Sizes are those that were asked for: a trace narrows them by questions that most models are the same for.
    """

    def __init__(self, inputs: Sequence[tuple[str, torch.Tensor]], asked: LeafShapes | None) -> None:
        """Name the symbols of inputs.

        Args:
            inputs: names, and values that a trace records.
            asked: their dynamic axes as they were asked for, None for what a file says.
        """
        self._ranges: dict[Any, SizeRange] = {}
        given: dict[Any, str] = {}
        defaults: dict[Any, str] = {}
        for leaf, (name, value) in enumerate(inputs):
            size: Any
            for axis, size in enumerate(value.shape):
                expression = _expression(size)
                if expression is None:
                    continue
                dim = asked[leaf].get(axis) if asked else None
                sizes = range_of(size) if asked is None else range_asked(dim)
                self._ranges[expression] = self._ranges.get(expression, ANY) & sizes
                if expression.is_symbol:
                    defaults.setdefault(expression, f"{name}_{axis}" if axis else "batch")
                root = getattr(dim, "root", None)  # of `2 * Dim("n")`, whose name is "2*n"
                own = getattr(dim if root is None else root, "__name__", None)
                if own and expression.is_symbol == (root is None) and len(expression.free_symbols) == 1:
                    given.setdefault(next(iter(expression.free_symbols)), str(own))
        self._names = Names()
        self._known = {expression: self._names.new(name) for expression, name in given.items()}
        for expression, name in defaults.items():
            if expression not in self._known:
                self._known[expression] = self._names.new(name)

    def of(self, size: Any) -> Dimension:
        """Return a size, or the name of a dynamic one ("batch", "2*batch")."""
        expression = _expression(size)
        if expression is None:
            return int(size)
        symbols = {symbol: self._name(symbol, str(symbol)) for symbol in sorted(expression.free_symbols, key=str)}
        named = expression.xreplace({symbol: type(symbol)(name) for symbol, name in symbols.items()})
        return printed(named) or self._name(expression, "size")

    def range_of(self, size: Any) -> SizeRange:
        """Return which sizes an axis of an input may have."""
        return self._ranges.get(_expression(size), ANY)

    def _name(self, expression: Any, wanted: str) -> str:
        """Return the name that an expression has from the first time on."""
        if expression not in self._known:
            self._known[expression] = self._names.new(wanted)
        return self._known[expression]


def declared_axes(model: nn.Module, inputs: int) -> list[dict[int, TiedAxis]]:
    """Return for each tensor that a model takes its dynamic axes, if torch.export has made it."""
    nodes = model.graph.find_nodes(op="placeholder") if isinstance(model, fx.GraphModule) else []
    values: list[Any] = [value for node in nodes if isinstance(value := node.meta.get("val"), torch.Tensor)]
    if len(values) != inputs:
        return [{} for _ in range(inputs)]
    return [
        {
            axis: TiedAxis(_line(expression) or Linear(f"axis_{leaf}_{axis}", 1, 0), range_of(size))
            for axis, size in enumerate(value.shape)
            if (expression := _expression(size)) is not None
        }
        for leaf, value in enumerate(values)
    ]


def _line(expression: Any) -> Linear | None:
    found = linear(printed(expression) or "")
    return found if found and found.factor > 0 else None


def _expression(size: Any) -> Any:
    """Return the symbolic expression of a size, None where it is a plain number."""
    if not isinstance(size, torch.SymInt):
        return None
    expression = size.node.expr
    return None if expression.is_number else expression
