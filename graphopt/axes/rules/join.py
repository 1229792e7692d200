"""Concatenation and taking apart: cat joins segments; split, chunk and slice name segments of a dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import fx

from graphopt.axes.call import Call
from graphopt.axes.edit import Edit
from graphopt.axes.layout import ONE, Dims, Layout, Size, concat, product, size
from graphopt.axes.registry import rule
from graphopt.axes.solver import equal

_SELECTS = 8  # of one tensor, beyond which its dimension is kept whole


@rule("aten::cat", "aten::concat", "aten::concatenate")
def cat(call: Call) -> Dims:
    # A tensor of shape (0,) is skipped by cat, whatever the rank of the others.
    shapes = [dims for dims in call.many("tensors") if len(dims) > 1 or [size(d) for d in dims] != [0]]
    if not shapes:
        return call.axes(call.shape())
    return joined(call, shapes, call.position("dim", len(shapes[0])))


def joined(call: Call, shapes: Sequence[Dims], along: int) -> Dims:
    """Put tensors of one rank side by side along a dimension; the others are the same positions."""
    result = list(shapes[0])
    for other in shapes[1:]:
        for d in range(len(result)):
            if d != along:
                call.unify(result[d], other[d])
    segments = [dims[along] for dims in shapes if size(dims[along]) != 0]
    result[along] = _side_by_side(call, segments, call.shape()[along])
    return tuple(result)


def _side_by_side(call: Call, segments: list[Layout], length: Size) -> Layout:
    if not segments:
        return call.axis(length)
    if len(segments) == 1:
        return segments[0]
    if all(isinstance(size(segment), int) for segment in segments):
        return concat(segments)
    call.freeze(segments, "joined with a dynamic size")
    return call.axis(length, call.because("joined with a dynamic size"))


@rule("aten::stack")
def stack(call: Call) -> Dims:
    shapes = call.many("tensors")
    for other in shapes[1:]:
        call.unify_dims(shapes[0], other)
    dims = list(shapes[0])
    dims.insert(call.position("dim", len(dims) + 1), call.axis(len(shapes), call.because("stacked operands")))
    return tuple(dims)


def rewrite_pieces(edit: Edit) -> None:
    """Split by explicit sizes: equal pieces may be unequal now."""
    results = cast("list[Dims]", edit.results())
    rank = len(edit.dims("self"))
    along = edit.position("dim", rank)
    if any(edit.changed(dims[along]) for dims in results):
        lengths = [edit.new_size(dims[along]) for dims in results]
        edit.retarget(torch.ops.aten.split_with_sizes.default, self=edit.arg("self"), split_sizes=lengths, dim=along)


@rule(
    "aten::chunk",
    "aten::split",
    "aten::split_with_sizes",
    "aten::tensor_split",
    "aten::unsafe_chunk",
    "aten::unsafe_split",
    "aten::unsafe_split_with_sizes",
    rewrite=rewrite_pieces,
)
def pieces(call: Call) -> list[Dims | None]:
    dims = call.dims("self")
    return taken_apart(call, dims, call.position("dim", len(dims)))


def taken_apart(call: Call, dims: Dims, along: int) -> list[Dims | None]:
    """Cut a dimension at the sizes of the results."""
    lengths = [call.shape(index)[along] for index in range(len(call.node.meta["val"]))]
    whole = dims[along]
    if len(lengths) == 1:
        return [dims]
    if isinstance(size(whole), int) and all(isinstance(length, int) and length > 0 for length in lengths):
        parts = call.axes(lengths)
        call.unify_terms(whole, concat(parts))
    else:
        call.freeze(whole, "taken apart at dynamic sizes")
        parts = call.axes(lengths, call.because("taken apart at dynamic sizes"))
    return [(*dims[:along], part, *dims[along + 1 :]) for part in parts]


@rule("aten::unbind")
def unbind(call: Call) -> list[Dims | None]:
    dims = call.dims("self")
    along = call.position("dim", len(dims))
    call.freeze(dims[along], "single positions are taken out")
    rest = (*dims[:along], *dims[along + 1 :])
    return [rest for _ in call.node.meta["val"]]


def rewrite_select(edit: Edit) -> None:
    """Bring the index up to date: what came before has shrunk."""
    if edit.has_note("before"):
        edit.set("index", edit.new_size(edit.note("before")))


@rule("aten::select", rewrite=rewrite_select)
def select(call: Call) -> Dims:
    """Take out one position: it stays, what is before and after it is free."""
    dims = call.dims("self")
    along = call.position("dim", len(dims))
    whole, index = dims[along], call.arg("index")
    rest = (*dims[:along], *dims[along + 1 :])
    length = size(whole)
    if whole == ONE or not isinstance(length, int) or not isinstance(index, int) or _taken_often(call):
        call.freeze(whole, "a single position is taken out")
        return rest
    index += length if index < 0 else 0
    before, after = call.axes((index, length - index - 1))
    call.unify_terms(whole, concat([part for part in (before, ONE, after) if size(part) != 0]))
    call.note("before", before)
    return rest


def _taken_often(call: Call) -> bool:
    """Tell whether a tensor is taken apart position by position, as a loop over time does.

    Nothing would be left to go, and cutting it n times takes n * n steps.
    """
    source = call.node.args[0]
    return isinstance(source, fx.Node) and sum(user.target == call.node.target for user in source.users) > _SELECTS


def rewrite_slice(edit: Edit) -> None:
    """Bring the bounds up to date: what came before has shrunk, and so has what is taken."""
    if edit.has_note("before"):
        start = edit.new_size(edit.note("before"))
        edit.set("start", start)
        edit.set("end", start + edit.new_size(edit.note("taken")))


@rule("aten::slice", "aten::slice_copy", rewrite=rewrite_slice)
def slice_dimension(call: Call) -> Dims:
    dims = call.dims("self")
    along = call.position("dim", len(dims))
    whole, taken = dims[along], call.shape()[along]
    step = int(call.arg("step"))
    if step == 1 and equal(size(whole), taken):
        return dims
    length = size(whole)
    start = call.arg("start") or 0
    if not isinstance(length, int) or not isinstance(start, int) or not isinstance(taken, int) or taken == 0:
        return _frozen_slice(call, dims, along)
    start = min(max(start + length if start < 0 else start, 0), length)
    if step != 1:
        return _strided(call, dims, along, start, step)
    return _segment(call, dims, along, start)


def rewrite_narrow(edit: Edit) -> None:
    """Bring start and length up to date."""
    if edit.has_note("before"):
        edit.set("start", edit.new_size(edit.note("before")))
        edit.set("length", edit.new_size(edit.note("taken")))


@rule("aten::narrow", rewrite=rewrite_narrow)
def narrow(call: Call) -> Dims:
    dims = call.dims("self")
    along = call.position("dim", len(dims))
    length, start, taken = size(dims[along]), call.arg("start"), call.shape()[along]
    if equal(length, taken):
        call.note("before", call.axis(0))
        call.note("taken", dims[along])
        return dims
    if not isinstance(length, int) or not isinstance(start, int) or not isinstance(taken, int) or taken == 0:
        return _frozen_slice(call, dims, along)
    return _segment(call, dims, along, start + length if start < 0 else start)


def _segment(call: Call, dims: Dims, along: int, start: int) -> Dims:
    whole, taken = dims[along], call.shape()[along]
    before, middle, after = call.axes((start, cast(int, taken), cast(int, size(whole)) - start - cast(int, taken)))
    call.unify_terms(whole, concat([part for part in (before, middle, after) if size(part) != 0]))
    call.note("before", before)
    call.note("taken", middle)
    return (*dims[:along], middle, *dims[along + 1 :])


def _strided(call: Call, dims: Dims, along: int, start: int, step: int) -> Dims:
    """Take every step-th position: the dimension is (taken x step), of which one column is kept."""
    whole, taken = dims[along], call.shape()[along]
    if start < step and equal(size(whole), taken * step):
        kept = call.axis(taken)
        columns = call.axis(step, call.because("every step-th position is taken"))
        call.unify_terms(whole, product([kept, columns]))
        return (*dims[:along], kept, *dims[along + 1 :])
    return _frozen_slice(call, dims, along)


def _frozen_slice(call: Call, dims: Dims, along: int) -> Dims:
    call.freeze(dims[along], "sliced")
    part = call.axis(call.shape()[along], call.because("sliced"))
    return (*dims[:along], part, *dims[along + 1 :])


@rule("aten::slice_scatter", rewrite=rewrite_slice)
def slice_scatter(call: Call) -> Dims:
    """Write over a segment: it has the positions of what is written."""
    dims, source = call.dims("self"), call.dims("src")
    along = call.position("dim", len(dims))
    for d in range(len(dims)):
        if d != along:
            call.unify(dims[d], source[d])
    whole, taken = size(dims[along]), size(source[along])
    start, step = call.arg("start") or 0, call.arg("step")
    if not isinstance(whole, int) or not isinstance(taken, int) or not isinstance(start, int) or step != 1 or not taken:
        call.freeze((dims[along], source[along]), "written over in part")
        return dims
    start = min(max(start + whole if start < 0 else start, 0), whole)
    before, after = call.axes((start, whole - start - taken))
    call.unify_terms(dims[along], concat([part for part in (before, source[along], after) if size(part) != 0]))
    call.note("before", before)
    call.note("taken", source[along])
    return dims


@rule("aten::select_scatter")
def select_scatter(call: Call) -> Dims:
    dims, source = call.dims("self"), call.dims("src")
    along = call.position("dim", len(dims))
    call.freeze(dims[along], "a single position is written")
    call.unify_dims((*dims[:along], *dims[along + 1 :]), source)
    return dims


@rule("aten::glu")
def glu(call: Call) -> Dims:
    dims = call.dims("self")
    along = call.position("dim", len(dims))
    half = call.axis(call.shape()[along])
    call.unify_terms(dims[along], concat([half, half]))
    return (*dims[:along], half, *dims[along + 1 :])


@rule("aten::pad", "aten::constant_pad_nd")
def pad(call: Call) -> Dims:
    """Padding with a constant puts frozen segments around a dimension; any other mode mixes positions."""
    dims = list(call.dims("self"))
    amounts: Sequence[object] = call.arg("pad")
    constant = "mode" not in call.names() or call.arg("mode") == "constant"
    for index in range(len(amounts) // 2):
        before, after = amounts[2 * index], amounts[2 * index + 1]
        d = len(dims) - 1 - index
        if before == 0 and after == 0:
            continue
        dims[d] = _padded(call, dims[d], before, after, call.shape()[d], constant)
    return tuple(dims)


def _padded(call: Call, layout: Layout, before: object, after: object, length: Size, constant: bool) -> Layout:
    if (
        not constant
        or not isinstance(before, int)
        or not isinstance(after, int)
        or min(before, after) < 0
        or not isinstance(size(layout), int)
    ):
        call.freeze(layout, "padded")
        return call.axis(length, call.because("padded"))
    parts = [call.axis(before, call.because("padding")), layout, call.axis(after, call.because("padding"))]
    return concat([part for part in parts if size(part) != 0])
