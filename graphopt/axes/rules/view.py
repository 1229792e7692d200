"""Views: reshaping makes products of matching runs of dimensions equal; permuting reorders dimensions."""

from __future__ import annotations

import torch

from graphopt.axes.call import Call
from graphopt.axes.edit import Edit
from graphopt.axes.layout import ONE, Dims, Layout, Size, product, size
from graphopt.axes.registry import rule
from graphopt.axes.solver import equal


def rewrite_sizes(edit: Edit) -> None:
    """Bring the list of sizes up to date; -1 keeps its meaning."""
    name = next(name for name in ("size", "shape", "sizes") if name in edit.names())
    given = edit.arg(name)
    edit.set(name, edit.sizes(edit.result()[-len(given) :], given))


def rewrite_unflatten(edit: Edit) -> None:
    """Bring the sizes of the new dimensions up to date."""
    given = edit.arg("sizes")
    start = edit.position("dim", len(edit.dims("self")))
    edit.set("sizes", edit.sizes(edit.result()[start : start + len(given)], given))


@rule(
    "aten::_reshape_alias",
    "aten::_unsafe_view",
    "aten::reshape",
    "aten::view",
    "aten::view_copy",
    rewrite=rewrite_sizes,
    resizes=True,
)
@rule("aten::flatten", "aten::ravel")
@rule("aten::unflatten", rewrite=rewrite_unflatten, resizes=True)
def reshape(call: Call) -> Dims:
    return _reshaped(call)


def _reshaped(call: Call) -> Dims:
    old, wanted = list(call.dims("self")), list(call.shape())
    if 0 in wanted:
        call.freeze(old, "empty tensor")
        return call.axes(wanted, call.because("empty tensor"))
    head, tail = _common_ends(old, wanted)
    front, back = old[:head], old[len(old) - tail :]
    middle = call.axes(wanted[head : len(wanted) - tail])
    call.unify_terms(product(old[head : len(old) - tail]), product(middle))
    return (*front, *middle, *back)


@rule("aten::reshape_as", "aten::view_as")
def reshape_as(call: Call) -> Dims:
    """The result has the sizes of another tensor, so it must lose what that one loses."""
    result = _reshaped(call)
    call.unify_dims(result, call.dims("other"))
    return result


def _common_ends(old: list[Layout], wanted: list[Size]) -> tuple[int, int]:
    """Count the dimensions at the front and at the back that the reshape leaves as they are."""
    shorter = min(len(old), len(wanted))
    head = 0
    while head < shorter and equal(size(old[head]), wanted[head]):
        head += 1
    tail = 0
    while tail < shorter - head and equal(size(old[-1 - tail]), wanted[-1 - tail]):
        tail += 1
    return head, tail


@rule("aten::view.dtype")
def reinterpret(call: Call) -> Dims:
    call.freeze(call.dims("self"), "bytes are reinterpreted")
    return call.axes(call.shape(), call.because("bytes are reinterpreted"))


@rule("aten::unsqueeze")
def unsqueeze(call: Call) -> Dims:
    dims = list(call.dims("self"))
    dims.insert(call.position("dim", len(dims) + 1), ONE)
    return tuple(dims)


def rewrite_squeeze(edit: Edit) -> None:
    """Name the dimensions that were of size 1: one that shrank to 1 stays."""
    dims = edit.dims("self")
    named = edit.arg("dim") if "dim" in edit.names() else list(range(len(dims)))
    positions = [d % len(dims) for d in ([named] if isinstance(named, int) else named)] if dims else []
    single = [d for d in positions if dims[d] == ONE]
    if single:
        edit.retarget(torch.ops.aten.squeeze.dims, self=edit.arg("self"), dim=single)
    else:
        edit.retarget(torch.ops.aten.alias.default, self=edit.arg("self"))


@rule("aten::squeeze", rewrite=rewrite_squeeze)
def squeeze(call: Call) -> Dims:
    dims = call.dims("self")
    named = call.positions("dim", len(dims)) if "dim" in call.names() else list(range(len(dims)))
    return tuple(layout for d, layout in enumerate(dims) if not (d in named and layout == ONE))


@rule("aten::permute")
def permute(call: Call) -> Dims:
    dims = call.dims("self")
    return tuple(dims[int(d)] for d in call.arg("dims"))


@rule("aten::transpose", "aten::swapaxes", "aten::swapdims")
def transpose(call: Call) -> Dims:
    dims = list(call.dims("self"))
    first, second = (name for name in call.names() if name != "self")
    a, b = call.position(first, len(dims)), call.position(second, len(dims))
    if dims:
        dims[a], dims[b] = dims[b], dims[a]
    return tuple(dims)


@rule("aten::t", "aten::numpy_T")
def reverse(call: Call) -> Dims:
    return tuple(reversed(call.dims("self")))


@rule("aten::mT", "aten::mH", "aten::adjoint", "aten::matrix_H")
def swap_last(call: Call) -> Dims:
    *batch, rows, columns = call.dims("self")
    return (*batch, columns, rows)


@rule("aten::movedim", "aten::moveaxis")
def move(call: Call) -> Dims:
    dims = call.dims("self")
    source, target = call.positions("source", len(dims)), call.positions("destination", len(dims))
    rest = iter(d for d in range(len(dims)) if d not in source)
    placed = dict(zip(target, source, strict=True))
    return tuple(dims[placed[d] if d in placed else next(rest)] for d in range(len(dims)))
