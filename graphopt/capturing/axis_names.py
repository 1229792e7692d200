"""What dynamic axes are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphopt.ir.dynamic_axes import LeafShapes
from graphopt.ir.signature import Dimension


class AxisNames:
    """Names for the symbols of dynamic axes: "batch" for the shared first axis, the user's `Dim` names, or made up."""

    def __init__(self, leaf_shapes: LeafShapes) -> None:
        self._asked = leaf_shapes
        self._names: dict[Any, str] = {}

    def learn(self, leaf: int, input_name: str, shape: Sequence[Any]) -> None:
        """Name the symbols of one input."""
        for axis, size in enumerate(shape):
            expression = _expression(size)
            if expression is None or not expression.is_symbol or expression in self._names:
                continue
            asked = self._asked[leaf].get(axis) if leaf < len(self._asked) else None
            given = getattr(asked, "__name__", None)
            default = "batch" if axis == 0 else f"{input_name}_{axis}"
            self._names[expression] = str(given) if given else default

    def of(self, size: Any) -> Dimension:
        """Return a size, or the name of a dynamic one ("batch", "2*batch")."""
        expression = _expression(size)
        if expression is None:
            return int(size)
        renamed = expression.xreplace({symbol: type(symbol)(name) for symbol, name in self._names.items()})
        return str(renamed).replace(" ", "")


def _expression(size: Any) -> Any:
    """Return the symbolic expression of a size, None where it is a plain number."""
    if not isinstance(size, torch.SymInt):
        return None
    expression = size.node.expr
    return None if expression.is_number else expression
