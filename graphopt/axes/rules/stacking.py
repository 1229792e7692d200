"""Named ways to stack and unstack: hstack, vstack, dstack, column_stack and their inverses are cat and split."""

from __future__ import annotations

from typing import cast

import torch

from graphopt.axes.call import Call
from graphopt.axes.edit import Edit
from graphopt.axes.layout import ONE, Dims, Layout, concat, product
from graphopt.axes.registry import rule
from graphopt.axes.rules.join import joined, taken_apart


@rule("aten::atleast_1d", "aten::atleast_2d", "aten::atleast_3d")
def at_least(call: Call) -> Dims | list[Dims | None]:
    rank = next(count for count in (1, 2, 3) if f"_{count}d" in call.where)
    if "tensors" in call.names():
        return [_raised(dims, rank) for dims in call.many("tensors")]
    return _raised(call.dims("self"), rank)


def _raised(dims: Dims, rank: int) -> Dims:
    """Add dimensions of size 1 where torch does: (n) is (1, n) in two and (1, n, 1) in three, (m, n) is (m, n, 1)."""
    if len(dims) >= rank:
        return dims
    if len(dims) == 0:
        return (ONE,) * rank
    front = (ONE,) if len(dims) == 1 else ()
    return (*front, *dims, *((ONE,) * (rank - len(dims) - len(front))))


@rule("aten::hstack")
def side_by_side(call: Call) -> Dims:
    shapes = [_raised(dims, 1) for dims in call.many("tensors")]
    return joined(call, shapes, 0 if len(shapes[0]) == 1 else 1)


@rule("aten::vstack", "aten::row_stack")
def on_top(call: Call) -> Dims:
    return joined(call, [_raised(dims, 2) for dims in call.many("tensors")], 0)


@rule("aten::dstack")
def in_depth(call: Call) -> Dims:
    return joined(call, [_raised(dims, 3) for dims in call.many("tensors")], 2)


@rule("aten::column_stack")
def columns(call: Call) -> Dims:
    shapes = [(*dims, *((ONE,) * (2 - len(dims)))) for dims in call.many("tensors")]
    return joined(call, shapes, 1)


def rewrite_split(edit: Edit) -> None:
    """Split by explicit sizes: equal pieces may be unequal now."""
    results = cast("list[Dims]", edit.results())
    along = _split_dimension(str(edit.node.target), len(edit.dims("self")))
    if any(edit.changed(dims[along]) for dims in results):
        lengths = [edit.new_size(dims[along]) for dims in results]
        edit.retarget(torch.ops.aten.split_with_sizes.default, self=edit.arg("self"), split_sizes=lengths, dim=along)


@rule("aten::hsplit", "aten::vsplit", "aten::dsplit", rewrite=rewrite_split)
def unstacked(call: Call) -> list[Dims | None]:
    dims = call.dims("self")
    return taken_apart(call, dims, _split_dimension(str(call.node.target), len(dims)))


def _split_dimension(target: str, rank: int) -> int:
    if "vsplit" in target:
        return 0
    if "dsplit" in target:
        return 2
    return 0 if rank == 1 else 1


@rule("aten::block_diag")
def block_diagonal(call: Call) -> Dims:
    """Place matrices corner to corner: rows beside rows, columns beside columns."""
    rows: list[Layout] = []
    across: list[Layout] = []
    for dims in call.many("tensors"):
        *row, column = (ONE,) * (2 - len(dims)) + dims
        rows.append(product(row))
        across.append(column)
    return (concat(rows), concat(across))
