"""Indexing: the dimension that is indexed keeps its order and size; the others pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphopt.axes.call import Call
from graphopt.axes.layout import Dims, Layout
from graphopt.axes.registry import rule

_REASON = "addressed by index"


@rule("aten::embedding")
def embedding(call: Call) -> Dims:
    rows, columns = call.dims("weight")
    call.freeze(rows, "rows of a table")
    call.produces(call.arg("weight"), 1)
    return (*call.dims("indices"), columns)


@rule("aten::embedding_bag", "aten::_embedding_bag")
def embedding_bag(call: Call) -> list[Dims | None]:
    """Sum rows of a table into bags; which rows, and with what weights, are data."""
    rows, columns = call.dims("weight")
    call.freeze(rows, "rows of a table")
    for name in ("indices", "offsets", "per_sample_weights"):
        if call.has(name):
            call.freeze(call.dims(name), "bags")
    call.produces(call.arg("weight"), 1)
    bags, _ = call.shape(0)
    first: Dims = (call.axis(bags, call.because("bags")), columns)
    # The largest row of a bag has a number for each column; the other two say where bags begin and how long they are.
    others = [call.axes(call.shape(index), call.because("bags")) for index in (1, 2)]
    largest = call.shape(3)
    return [first, *others, first if len(largest) == len(first) else call.axes(largest, call.because("bags"))]


@rule("aten::embedding_renorm")
def shorten_rows(call: Call) -> Dims:
    """Rows of a table that are too long are written over."""
    dims = call.dims("self")
    call.freeze((*dims, *call.dims("indices")), "rows are shortened in place")
    return dims


@rule("aten::index", "aten::_unsafe_index")
def index(call: Call) -> Dims:
    dims, wanted = call.dims("self"), call.shape()
    result = _addressed(call, dims, call.arg("indices"), len(wanted))
    if result is None or len(result) != len(wanted):
        call.freeze(dims, _REASON)
        return call.axes(wanted, call.because(_REASON))
    # Dynamic lengths come from data: only the result knows them.
    return tuple(
        layout if call.sized(layout, length) else call.axis(length, call.because(_REASON))
        for layout, length in zip(result, wanted, strict=True)
    )


@rule("aten::index_put", "aten::_unsafe_index_put", "aten::_index_put_impl")
def index_put(call: Call) -> Dims:
    dims, values = call.dims("self"), call.dims("values")
    for index_node in call.arg("indices"):
        if isinstance(index_node, fx.Node):
            call.freeze(call.dims_of(index_node), _REASON)
    result = _addressed(call, dims, call.arg("indices"), None)
    if result is None:
        call.freeze((*dims, *values), _REASON)
        return dims
    for layout, value in zip(reversed(result), reversed(values), strict=False):
        if call.same_size(layout, value):
            call.unify(layout, value)
        else:
            call.freeze((layout, value), _REASON)
    return dims


def _addressed(call: Call, dims: Dims, indices: Sequence[Any], rank: int | None) -> Dims | None:
    """Return the layouts of `self[indices]`: addressed dimensions give way to those of the index tensors."""
    remaining = list(dims)
    passed: list[tuple[int, Layout]] = []
    addressed: list[int] = []
    index_dims: list[Dims] = []
    at = 0
    for entry in indices:
        if entry is None:
            at += 1
            continue
        value = entry.meta["val"] if isinstance(entry, fx.Node) else entry
        if value.dtype in (torch.bool, torch.uint8):
            covered = value.dim()
            if not covered:
                return None
            call.unify_dims(dims[at : at + covered], call.dims_of(entry))
            count = call.axis(_selected(call, rank, dims, covered, at), call.because(_REASON))
            index_dims.append((count,))
        else:
            covered = 1
            index_dims.append(call.dims_of(entry))
        call.freeze(remaining[at : at + covered], _REASON)
        addressed.extend(range(at, at + covered))
        at += covered
    passed = [(d, layout) for d, layout in enumerate(dims) if d not in addressed]
    if not addressed:
        return dims
    joint = call.broadcast(index_dims)
    first, last = addressed[0], addressed[-1]
    if addressed == list(range(first, last + 1)) and _adjacent(indices):
        before = [layout for d, layout in passed if d < first]
        after = [layout for d, layout in passed if d > last]
        return (*before, *joint, *after)
    return (*joint, *(layout for _, layout in passed))


def _adjacent(indices: Sequence[Any]) -> bool:
    given = [position for position, entry in enumerate(indices) if entry is not None]
    return given == list(range(given[0], given[-1] + 1))


def _selected(call: Call, rank: int | None, dims: Dims, covered: int, at: int) -> Any:
    """Return how many positions a mask selects: the result's own size, which only the data knows."""
    if rank is None or rank != len(dims) - covered + 1:
        return 0
    return call.shape()[at]


@rule("aten::index_select")
def index_select(call: Call) -> Dims:
    dims = list(call.dims("self"))
    along = call.position("dim", len(dims))
    call.freeze(dims[along], _REASON)
    chosen = call.dims("index")
    dims[along] = chosen[0] if chosen else call.axis(1)
    return tuple(dims)


@rule("aten::index_add", "aten::index_copy", "aten::index_fill", "aten::index_reduce")
def index_write(call: Call) -> Dims:
    dims = call.dims("self")
    along = call.position("dim", len(dims))
    call.freeze((dims[along], *call.dims("index")), _REASON)
    if "source" in call.names() and call.has("source"):
        source = call.dims("source")
        call.freeze(source[along], _REASON)
        for d in range(len(dims)):
            if d != along:
                call.unify(dims[d], source[d])
    return dims


@rule("aten::gather", "aten::take_along_dim")
def gather(call: Call) -> Dims:
    other = "index" if "index" in call.names() else "indices"
    dims, chosen = call.dims("self"), call.dims(other)
    if call.arg("dim") is None or not dims or len(dims) != len(chosen):
        call.freeze((*dims, *chosen), _REASON)
        return call.axes(call.shape(), call.because(_REASON))
    along = call.position("dim", len(dims))
    call.freeze(dims[along], _REASON)
    _alongside(call, dims, chosen, along)
    if other == "indices":  # broadcasts
        rest = call.broadcast([(*dims[:along], *dims[along + 1 :]), (*chosen[:along], *chosen[along + 1 :])])
        return (*rest[:along], chosen[along], *rest[along:])
    return chosen


@rule("aten::scatter", "aten::scatter_add", "aten::scatter_reduce")
def scatter(call: Call) -> Dims:
    dims, chosen = call.dims("self"), call.dims("index")
    if not dims or len(dims) != len(chosen):
        call.freeze((*dims, *chosen), _REASON)
        return dims
    along = call.position("dim", len(dims))
    call.freeze((dims[along], chosen[along]), _REASON)
    _alongside(call, dims, chosen, along)
    if "src" in call.names() and call.has("src"):
        source = call.dims("src")
        call.freeze(source[along], _REASON)
        _alongside(call, chosen, source, along)
    return dims


def _alongside(call: Call, dims: Dims, chosen: Dims, along: int) -> None:
    """An index as long as the data goes with it position by position; a shorter one takes the first ones."""
    for d, (layout, index_layout) in enumerate(zip(dims, chosen, strict=True)):
        if d == along:
            continue
        if call.same_size(layout, index_layout):
            call.unify(layout, index_layout)
        else:
            call.freeze((layout, index_layout), _REASON)


@rule("aten::one_hot")
def one_hot(call: Call) -> Dims:
    return (*call.dims("self"), call.axis(call.shape()[-1], call.because("number of classes")))


@rule("aten::diagonal", "aten::diag_embed")
def diagonal(call: Call) -> Dims:
    call.freeze(call.dims("self"), "a diagonal is taken")
    return call.axes(call.shape(), call.because("a diagonal is taken"))


@rule(
    "aten::masked_scatter",
    "aten::take",
    "aten::put",
    "aten::diagonal_scatter",
    "aten::_unsafe_masked_index_put_accumulate",
)
def written_in_order(call: Call) -> Dims:
    """Elements are taken or written one after the other, whatever the shape."""
    return call.whole("elements are counted in order")


@rule("aten::isin", "aten::bucketize")
def among(call: Call) -> Dims:
    """Every element is looked up in a list by itself."""
    first, *lists = call.tensors()
    for dims in lists:
        call.freeze(dims, _REASON)
    return first


@rule("aten::searchsorted")
def searched(call: Call) -> Dims:
    for dims in call.tensors():
        call.freeze(dims, _REASON)
    return call.axes(call.shape(), call.because(_REASON))


@rule(
    "aten::_unsafe_masked_index",
    "aten::argwhere",
    "aten::as_strided",
    "aten::as_strided_scatter",
    "aten::bincount",
    "aten::masked_select",
    "aten::nonzero",
    "aten::nonzero_static",
)
def positions_of(call: Call) -> Dims:
    return call.whole("positions are returned")
