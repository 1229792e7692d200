"""What dynamic axes are called, and which sizes they may have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from graphopt.ir.dynamic_axes import LeafShapes, bound_dim
from graphopt.ir.names import Names
from graphopt.ir.signature import Dimension
from graphopt.ir.sizes import ANY, SizeRange
from graphopt.ir.torch_internals import range_asked, range_of


class AxisNames:
    """Names for the symbols of dynamic axes, each of its own: equal names are equal sizes.

    The user's `Dim` names come first. Of what has none, a first axis is "batch" (the next one "batch_1"), and others
    are called after their input and axis ("x_2").

    Sizes are those that were asked for: a trace narrows them by questions that most models are the same for.
    """

    def __init__(self, leaf_shapes: LeafShapes | None) -> None:
        """Know what was asked for, None for what a file says."""
        self._asked = leaf_shapes
        self._given: dict[Any, str] = {}
        self._defaults: dict[Any, str] = {}
        self._ranges: dict[Any, SizeRange] = {}

    def learn(self, leaf: int, input_name: str, shape: Sequence[Any]) -> None:
        """Meet the symbols of one input; none is named before all inputs are known."""
        for axis, size in enumerate(shape):
            expression = _expression(size)
            if expression is None:
                continue
            asked = self._asked[leaf].get(axis) if self._asked else None
            sizes = range_of(size) if self._asked is None else range_asked(asked)
            self._ranges[expression] = self._ranges.get(expression, ANY) & sizes
            if not expression.is_symbol:
                continue
            given = getattr(asked, "__name__", None)
            if given:
                self._given.setdefault(expression, str(given))
            self._defaults.setdefault(expression, f"{input_name}_{axis}" if axis else "batch")

    def of(self, size: Any) -> Dimension:
        """Return a size, or the name of a dynamic one ("batch", "2*batch")."""
        expression = _expression(size)
        if expression is None:
            return int(size)
        for symbol in sorted(expression.free_symbols, key=str):
            self._defaults.setdefault(symbol, str(symbol))
        names = Names()
        wanted = {**self._given, **self._defaults, **self._given}  # whoever comes first has its name
        renamed = expression.xreplace({symbol: type(symbol)(names.new(name)) for symbol, name in wanted.items()})
        return str(renamed).replace(" ", "")

    def range_of(self, size: Any) -> SizeRange:
        """Return which sizes an axis of an input may have."""
        return self._ranges.get(_expression(size), ANY)


def declared_ranges(model: nn.Module, inputs: int) -> list[dict[int, SizeRange]]:
    """Return for each tensor that a model takes the sizes of its dynamic axes, if torch.export has made it."""
    nodes = model.graph.find_nodes(op="placeholder") if isinstance(model, fx.GraphModule) else []
    values: list[Any] = [value for node in nodes if isinstance(value := node.meta.get("val"), torch.Tensor)]
    if len(values) != inputs:
        return [{} for _ in range(inputs)]
    return [
        {axis: range_of(size) for axis, size in enumerate(value.shape) if _expression(size) is not None}
        for value in values
    ]


def within(dim: Any, sizes: SizeRange) -> Any:
    """Return an axis that is asked to be dynamic with its sizes bound."""
    return bound_dim(range_asked(dim) & sizes, getattr(dim, "__name__", ""))


def _expression(size: Any) -> Any:
    """Return the symbolic expression of a size, None where it is a plain number."""
    if not isinstance(size, torch.SymInt):
        return None
    expression = size.node.expr
    return None if expression.is_number else expression
