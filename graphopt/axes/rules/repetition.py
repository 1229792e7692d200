"""Repetition: a dimension of size 1 grows to a new axis; a repeated dimension is a product with the repeat."""

from __future__ import annotations

from graphopt.axes.call import Call
from graphopt.axes.edit import Edit
from graphopt.axes.layout import ONE, Dims, Layout, product
from graphopt.axes.registry import rule


def rewrite_sizes(edit: Edit) -> None:
    """Bring the list of sizes up to date; -1 keeps its meaning."""
    given = edit.arg("size")
    edit.set("size", edit.sizes(edit.result()[-len(given) :] if given else (), given))


@rule("aten::expand", "aten::expand_copy", "aten::broadcast_to", rewrite=rewrite_sizes, resizes=True)
def expand(call: Call) -> Dims:
    return _expanded(call, call.dims("self"))


def _expanded(call: Call, dims: Dims) -> Dims:
    wanted = call.shape()
    padded = (ONE,) * (len(wanted) - len(dims)) + dims
    return tuple(
        call.axis(length) if layout == ONE and length != 1 else layout
        for layout, length in zip(padded, wanted, strict=True)
    )


@rule("aten::expand_as")
def expand_as(call: Call) -> Dims:
    return call.broadcast([call.dims("self"), call.dims("other")])


@rule("aten::sum_to_size", rewrite=rewrite_sizes, resizes=True)
def sum_to_size(call: Call) -> Dims:
    """Undo an expansion: dimensions that shall have size 1, and those in front, are summed."""
    dims = call.dims("self")
    wanted = call.shape()
    kept = dims[len(dims) - len(wanted) :]
    return tuple(ONE if length == 1 else layout for layout, length in zip(kept, wanted, strict=True))


def rewrite_repeats(edit: Edit) -> None:
    """Bring the repeats up to date."""
    name = "repeats" if "repeats" in edit.names() else "dims"
    given = list(edit.arg(name))
    for index, repeat in enumerate(given):
        if isinstance(repeat, int) and edit.has_note(f"repeat{index}"):
            given[index] = edit.new_size(edit.note(f"repeat{index}"))
    edit.set(name, given)


@rule("aten::repeat", "aten::tile", rewrite=rewrite_repeats)
def repeat(call: Call) -> Dims:
    """Lay copies of the whole dimension one after the other: (repeat x positions)."""
    dims, wanted = call.dims("self"), call.shape()
    given = call.arg("repeats" if "repeats" in call.names() else "dims")
    offset = len(wanted) - len(given)
    padded = (ONE,) * (len(wanted) - len(dims)) + dims
    result: list[Layout] = []
    for d, (layout, length) in enumerate(zip(padded, wanted, strict=True)):
        if length == 0 or call.sized(layout, length):
            result.append(layout if length != 0 else call.axis(0))
            continue
        copies = call.axis(call.quotient(length, layout))
        if d >= offset:
            call.note(f"repeat{d - offset}", copies)
        result.append(product([copies, layout]))
    return tuple(result)


def rewrite_interleave(edit: Edit) -> None:
    """Bring the repeat and the explicit output size up to date."""
    if edit.has_note("copies") and isinstance(edit.arg("repeats"), int):
        edit.set("repeats", edit.new_size(edit.note("copies")))
        if edit.arg("output_size") is not None:
            edit.set("output_size", edit.new_size(edit.result()[edit.position("dim", len(edit.result()))]))


@rule("aten::repeat_interleave.self_int", rewrite=rewrite_interleave)
def repeat_interleave(call: Call) -> Dims:
    """Repeat each position in place: (positions x repeat)."""
    dims = list(call.dims("self"))
    if call.arg("dim") is None:
        along, dims = 0, [product(dims)]
    else:
        along = call.position("dim", len(dims))
    length = call.shape()[along]
    if not call.sized(dims[along], length):
        copies = call.axis(call.quotient(length, dims[along]))
        call.note("copies", copies)
        dims[along] = product([dims[along], copies])
    return tuple(dims)


@rule("aten::repeat_interleave.self_Tensor")
def repeat_by_tensor(call: Call) -> Dims:
    dims = list(call.dims("self"))
    if call.arg("dim") is None:
        call.freeze(dims, "repeated by data")
        return call.axes(call.shape(), call.because("repeated by data"))
    along = call.position("dim", len(dims))
    call.freeze(dims[along], "repeated by data")
    call.freeze(call.dims("repeats"), "repeats")
    dims[along] = call.axis(call.shape()[along], call.because("repeated by data"))
    return tuple(dims)


@rule("aten::broadcast_tensors")
def broadcast_tensors(call: Call) -> list[Dims | None]:
    shapes = call.many("tensors")
    dims = call.broadcast(shapes)
    return [dims for _ in shapes]


@rule("aten::meshgrid")
def meshgrid(call: Call) -> list[Dims | None]:
    """Every result has one dimension per operand; indexing="xy" swaps the first two."""
    dims = [layouts[0] if layouts else ONE for layouts in call.many("tensors")]
    if "indexing" in call.names() and call.arg("indexing") == "xy" and len(dims) > 1:
        dims[0], dims[1] = dims[1], dims[0]
    return [tuple(dims) for _ in dims]


@rule("aten::unfold")
def windows(call: Call) -> Dims:
    """Cut a dimension into windows of consecutive positions, added as a last dimension."""
    dims = list(call.dims("self"))
    along = call.position("dimension", len(dims))
    call.freeze(dims[along], "cut into windows")
    wanted = call.shape()
    dims[along] = call.axis(wanted[along], call.because("cut into windows"))
    last = call.axis(wanted[-1], call.because("cut into windows"))
    return (*dims, last)
