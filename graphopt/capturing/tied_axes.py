"""Dynamic axes whose sizes depend on each other, as torch.export takes them (2.13).

    n and n         Dim.DYNAMIC and Dim.DYNAMIC, and while tracing a check of y.shape[0] == x.shape[0]
    n and 2*n       Dim.DYNAMIC and Dim.DYNAMIC, and one of y.shape[0] == 2 * x.shape[0]
    2*n alone       2 * Dim("_n")
    n, at most 2    Dim("_n", max=2)

Only the last two have names, which torch takes under no other form: of a name it proves that all sizes will do, which
one question of a kernel about one refutes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from graphopt.capturing.model_calls import called_through
from graphopt.ir.batch_sizes import solved
from graphopt.ir.dynamic_axes import LeafShapes, bound_dim
from graphopt.ir.size_expressions import Linear
from graphopt.ir.sizes import ANY, SizeRange
from graphopt.ir.torch_internals import SMALLEST_TRACED, arguments_by_name, check_traced, pytree


@dataclass(frozen=True)
class TiedAxis:
    """A dynamic axis, to be read like a `Dim` of torch's.

    Attributes:
        line: how its size depends on a name, which is that of other axes too.
        sizes: that it may have.
        given: what the user calls it.
    """

    line: Linear
    sizes: SizeRange = ANY
    given: str = ""

    @property
    def __name__(self) -> str:
        return self.given

    @property
    def min(self) -> int:
        """The smallest size."""
        return self.sizes.least

    @property
    def max(self) -> int | None:
        """The largest size, if there is one."""
        return self.sizes.most

    def at(self, value: Any) -> Any:
        """Return its size where the name has a value."""
        return self.line.factor * value + self.line.offset

    def value(self, size: int) -> int:
        """Return the smallest value of the name at which it is of a size or larger."""
        return -((self.line.offset - size) // self.line.factor)

    @property
    def alone(self) -> bool:
        """Whether it is what the name stands for."""
        return (self.line.factor, self.line.offset) == (1, 0)


def torch_dims(shapes: LeafShapes) -> LeafShapes:
    """Return dynamic axes as torch.export takes them."""
    values, checked = _values(shapes), _checked(shapes)

    def dim(axis: Any) -> Any:
        if not isinstance(axis, TiedAxis):
            return axis
        name, factor, offset = axis.line
        if name in checked:
            return bound_dim(axis.sizes)
        root = bound_dim(values[name], f"_{name}")
        multiple = root * factor if factor > 1 else root
        return multiple + offset if offset else multiple

    return [{place: dim(axis) for place, axis in axes.items()} for axes in shapes]


@contextlib.contextmanager
def sizes_tied(model: nn.Module, shapes: LeafShapes) -> Iterator[None]:
    """Let a trace know which axes are of sizes that depend on each other."""
    checked = [places for places in _checked(shapes).values() if len(places) > 1]

    def check(arguments: Iterable[Any]) -> None:
        tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
        for places in checked:
            (one, first), *_ = (place for place, axis in places.items() if axis.alone)
            for (other, second), axis in places.items():
                check_traced(
                    tensors[other].shape[second] == axis.at(tensors[one].shape[first]),
                    "its inputs have sizes that do not depend on each other as they were declared to",
                )

    forward = model.forward

    @functools.wraps(forward)
    def tied(*args: Any, **kwargs: Any) -> Any:
        check(pytree.tree_leaves(arguments_by_name(model, args, kwargs)))
        return forward(*args, **kwargs)

    if not checked:
        yield
    elif isinstance(model, fx.GraphModule):  # which torch runs call by call
        given = model.graph.find_nodes(op="placeholder")
        with model.graph.inserting_after(given[-1]):
            call = model.graph.call_function(check, (given,))
        try:
            yield
        finally:
            model.graph.erase_node(call)
    else:
        with called_through(model, tied):
            yield


def _tied(shapes: LeafShapes) -> dict[str, dict[tuple[int, int], TiedAxis]]:
    """Return by name the axes that depend on it."""
    found: dict[str, dict[tuple[int, int], TiedAxis]] = {}
    for leaf, axes in enumerate(shapes):
        for place, axis in axes.items():
            if isinstance(axis, TiedAxis):
                found.setdefault(axis.line.name, {})[leaf, place] = axis
    return found


def _values(shapes: LeafShapes) -> dict[str, SizeRange]:
    return {
        name: functools.reduce(
            SizeRange.__and__, [solved(axis.line.factor, axis.line.offset, axis.sizes) for axis in places.values()]
        )
        for name, places in _tied(shapes).items()
    }


def _checked(shapes: LeafShapes) -> dict[str, dict[tuple[int, int], TiedAxis]]:
    """Return those that need no name of torch's."""
    values = _values(shapes)
    return {
        name: places
        for name, places in _tied(shapes).items()
        if values[name].most != SMALLEST_TRACED and any(axis.alone for axis in places.values())
    }
