"""Calls along a dynamic axis in words that hold at any size; the exporter's are those of the example (torch 2.13).

adaptive_avg_pool(x, m)     the mean of x[i * n // m : ((i + 1) * n + m - 1) // m] for each i < m
adaptive_max_pool(x, m)     the largest of the same windows
tensor_split(x, k)          slices, the j-th of (n + k - 1 - j) // k
chunk(x, k)                 slices of (n + k - 1) // k
split(x, sizes)             slices

n is the size of the axis. Windows are read as rows of one length, in which their last element is repeated.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphopt.errors import LoweringError
from graphopt.ir.editor import Editor
from graphopt.ir.graph import arguments, erase_dead
from graphopt.ir.operators import Family
from graphopt.ir.provenance import at_line
from graphopt.ir.regions import graph_modules
from graphopt.ir.torch_internals import OpOverload, statically_known_true

aten = torch.ops.aten
Number = int | fx.Node

_MEANS = {aten.adaptive_avg_pool1d.default: 1, aten.adaptive_avg_pool2d.default: 2, aten.adaptive_avg_pool3d.default: 3}
_MAXIMA = {
    aten.adaptive_max_pool1d.default: 1,
    aten.adaptive_max_pool2d.default: 2,
    aten.adaptive_max_pool3d.default: 3,
}
_POOLS = _MEANS | _MAXIMA  # with how many axes they pool
_SPLITS_BY_SIZE = Family("split", "unsafe_split", "split_with_sizes", "unsafe_split_with_sizes")
_SPLITS = _SPLITS_BY_SIZE | Family("chunk", "unsafe_chunk", "tensor_split.sections")
_SIZES = ("split_size", "split_sizes", "chunks", "sections")  # what they call how they split


def hold_at_any_size(gm: fx.GraphModule) -> None:
    """Rewrite the calls in place; results keep their names, which the signature of an exported program holds.

    Raises:
        LoweringError: a call has no ONNX form.
    """
    for body in graph_modules(gm):
        for node in [node for node in body.graph.nodes if node.target in _POOLS or node in _SPLITS]:
            with body.graph.inserting_before(node):
                (_pool if node.target in _POOLS else _split)(_Calls(body, node))
        erase_dead(body.graph)


class _Calls:
    """Inserts what takes the place of a call."""

    def __init__(self, gm: fx.GraphModule, node: fx.Node) -> None:
        self.node = node
        self._editor = Editor(gm, "lowering")

    def __call__(self, target: OpOverload, *args: object) -> fx.Node:
        """Return what calls an operator."""
        return self._editor.call(target, *args, like=self.node)

    def number(self, compute: Callable[[Any, Any], Any], one: Number, other: Number) -> Number:
        """Return a number out of two, known now where both are."""
        known = isinstance(one, int) and isinstance(other, int)
        return compute(one, other) if known else self._editor.call(compute, one, other, like=self.node)

    def size(self, x: fx.Node, axis: int) -> Number:
        """Return the size of an axis."""
        size = x.meta["val"].shape[axis]
        return self(aten.sym_size.int, x, axis) if isinstance(size, torch.SymInt) else int(size)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let a result take the place and the name of another."""
        name = old.name
        self._editor.replace(old, new)
        new.name = name


def _pool(call: _Calls) -> None:
    node = call.node
    x, wanted = arguments(node, ("self", "output_size")).values()
    count = _POOLS[node.target]  # type: ignore[index]
    first = x.meta["val"].dim() - count
    sizes = [*wanted] * (count if len(wanted) == 1 else 1)
    pooled = [(axis, size) for axis, size in enumerate(sizes, first) if not _is_size(x, axis, size)]
    if all(size == 1 or not _is_dynamic(x, axis, size) for axis, size in pooled):
        return
    means = node.target in _MEANS
    for axis, size in pooled:
        x = _pooled(call, x, axis, size, means=means)
    if means:
        call.replace(node, x)
        return
    for user in [user for user in node.users if user.users]:
        if user.args[1] != 0:
            raise LoweringError(
                f"The pooling{at_line(node)} returns where the largest values are along an axis of dynamic size, which "
                "has no ONNX form. Leave out return_indices, or give that axis one size."
            )
        call.replace(user, x)


def _pooled(call: _Calls, x: fx.Node, axis: int, wanted: Number, *, means: bool) -> fx.Node:
    """Pool `x` along one axis."""
    rank, size = x.meta["val"].dim(), call.size(x, axis)
    over = call.number(operator.add, size, call.number(operator.sub, wanted, 1))
    longest = call.number(operator.add, call.number(operator.floordiv, over, wanted), 1)
    rise = call(aten.mul.Tensor, call(aten.arange.default, wanted), size)
    start = call(aten.unsqueeze.default, call(aten.floor_divide.default, rise, wanted), 1)  # (wanted, 1)
    end = call(aten.unsqueeze.default, call(aten.floor_divide.default, call(aten.add.Tensor, rise, over), wanted), 1)
    places = call(aten.add.Tensor, start, call(aten.arange.default, longest))  # (wanted, longest)
    inside = call(aten.minimum.default, places, call(aten.sub.Tensor, end, 1))
    read = call(aten.index_select.default, x, axis, call(aten.reshape.default, inside, [-1]))
    windows = call(aten.unflatten.int, read, axis, [wanted, longest])
    if not means:
        return call(aten.amax.default, windows, [axis + 1])
    behind = [1] * (rank - axis - 1)
    counted = call(aten.reshape.default, call(aten.lt.Tensor, places, end), [wanted, longest, *behind])
    total = call(aten.sum.dim_IntList, call(aten.where.ScalarOther, counted, windows, 0.0), [axis + 1])
    count = call(aten.to.dtype, call(aten.sub.Tensor, end, start), x.meta["val"].dtype)
    return call(aten.div.Tensor, total, call(aten.reshape.default, count, [wanted, *behind]))


def _split(call: _Calls) -> None:
    node = call.node
    given = arguments(node, ())
    x, axis = given["self"], given["dim"]
    sizes = next(given[name] for name in _SIZES if name in given)
    along = sizes if isinstance(sizes, list | tuple) else [sizes]
    read: dict[Any, fx.Node] = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    if len(read) < len(node.users) or not any(_is_dynamic(x, axis, size) for size in along):
        return
    n: Number = call.size(x, axis)
    start: Number = 0
    for place in range(max(read, default=-1) + 1):
        if isinstance(sizes, list | tuple):
            size = sizes[place]
        elif node in _SPLITS_BY_SIZE:
            size = sizes
        else:
            later = place if node.target is aten.tensor_split.sections else 0
            size = call.number(operator.floordiv, call.number(operator.add, n, sizes - 1 - later), sizes)
        end = call.number(operator.add, start, size)
        if place in read:
            part = node.graph.call_function(aten.slice.Tensor, (x, axis, start, end))
            part.meta = dict(read[place].meta)  # in the sizes that the rest of the graph knows it by
            call.replace(read[place], part)
        start = end


def _is_dynamic(x: fx.Node, axis: int, size: Number) -> bool:
    return isinstance(size, fx.Node) or isinstance(x.meta["val"].shape[axis], torch.SymInt)


def _is_size(x: fx.Node, axis: int, size: Number) -> bool:
    """Whether a number is the size of an axis whatever that is."""
    number = size.meta["val"] if isinstance(size, fx.Node) else size
    return statically_known_true(x.meta["val"].shape[axis] == number)
