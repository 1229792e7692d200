"""Operators that only move elements: the same move is made with the mask of removed elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.axes.proof.step import MaskedStep, masked_rule, raw, tensor_result
from graphopt.axes.proof.value import (
    CannotProveError,
    Dead,
    Value,
    Vector,
    broadcast,
    from_mask,
    known_or_counted,
    to_mask,
    union,
    vector,
)
from graphopt.ir.operators import schema_name
from graphopt.ir.torch_internals import pytree


@masked_rule(
    "aten::_reshape_alias",
    "aten::_unsafe_view",
    "aten::adjoint",
    "aten::atleast_1d",
    "aten::atleast_2d",
    "aten::atleast_3d",
    "aten::broadcast_to",
    "aten::channel_shuffle",
    "aten::chunk",
    "aten::column_stack",
    "aten::diagonal",
    "aten::diag_embed",
    "aten::dsplit",
    "aten::dstack",
    "aten::expand",
    "aten::expand_as",
    "aten::flatten",
    "aten::flip",
    "aten::fliplr",
    "aten::flipud",
    "aten::hsplit",
    "aten::hstack",
    "aten::mH",
    "aten::mT",
    "aten::matrix_H",
    "aten::movedim",
    "aten::moveaxis",
    "aten::narrow",
    "aten::narrow_copy",
    "aten::native_channel_shuffle",
    "aten::numpy_T",
    "aten::permute",
    "aten::pixel_shuffle",
    "aten::pixel_unshuffle",
    "aten::ravel",
    "aten::repeat",
    "aten::repeat_interleave.self_int",
    "aten::reshape",
    "aten::reshape_as",
    "aten::roll",
    "aten::rot90",
    "aten::row_stack",
    "aten::select",
    "aten::slice",
    "aten::split",
    "aten::split_with_sizes",
    "aten::squeeze",
    "aten::swapaxes",
    "aten::swapdims",
    "aten::t",
    "aten::tensor_split",
    "aten::tile",
    "aten::transpose",
    "aten::unbind",
    "aten::unflatten",
    "aten::unfold",
    "aten::unsafe_chunk",
    "aten::unsafe_split",
    "aten::unsafe_split_with_sizes",
    "aten::unsqueeze",
    "aten::view",
    "aten::view_as",
    "aten::vsplit",
    "aten::vstack",
    counts=True,
)
def move(step: MaskedStep) -> Any:
    """Make the same move with the mask of every operand that moves."""
    names = ["tensors"] if "tensors" in step.arguments else [step.first_name()]
    values = [value for name in names for value in pytree.tree_leaves(step[name])]
    moved = _moved(step, names[0], [value.dead for value in values])
    results, structure = pytree.tree_flatten(step.run())
    counted = _moved(step, names[0], [_countable(step, value) for value in values])
    found = []
    for result, dead, flags in zip(results, moved, counted, strict=True):
        new = {d: f for d, f in enumerate(flags) if f is not None and dead[d] is None}
        found.append(Value(result, dead, new))
    return pytree.tree_unflatten(found, structure)


def _countable(step: MaskedStep, value: Value) -> Dead:
    """Return what is removed or counted, but of a dimension that is cut into parts: how many fall into each is open."""
    flags = list(known_or_counted(value))
    if schema_name(step.target).removesuffix("_copy") in _CUTS:
        dim = step.dim("dim", len(flags))
        flags[dim] = value.dead[dim]
    return tuple(flags)


def _moved(step: MaskedStep, name: str, dead: Sequence[Dead]) -> list[Dead]:
    given, structure = pytree.tree_flatten(step[name])
    masks = [to_mask(value.tensor.shape, flags) for value, flags in zip(given, dead, strict=True)]
    moved = step.run(**{name: pytree.tree_unflatten(masks, structure)})
    return [from_mask(mask) for mask in pytree.tree_leaves(moved)]


_CUTS = frozenset(
    f"aten::{name}"
    for name in (
        "chunk",
        "narrow",
        "slice",
        "split",
        "split_with_sizes",
        "tensor_split",
        "unsafe_chunk",
        "unsafe_split",
    )
)


@masked_rule("aten::broadcast_tensors")
def broadcast_tensors(step: MaskedStep) -> list[Value]:
    dead = broadcast(value.dead for value in step["tensors"])
    return [Value(result, dead) for result in step.run()]


@masked_rule("aten::meshgrid")
def meshgrid(step: MaskedStep) -> list[Value]:
    """Every result has one dimension per operand; `xy` swaps the first two."""
    dead = [value.dead[0] if value.dead else None for value in step["tensors"]]
    if step.arguments.get("indexing") == "xy" and len(dead) > 1:
        dead[0], dead[1] = dead[1], dead[0]
    return [Value(result, tuple(dead)) for result in step.run()]


@masked_rule("aten::block_diag")
def block_diagonal(step: MaskedStep) -> Value:
    """Rows beside rows, columns beside columns."""
    shapes = [((1, 1, *v.tensor.shape)[-2:], (None, None, *v.dead)[-2:]) for v in step["tensors"]]
    dead = (vector(torch.cat([_flags(flags[d], size[d]) for size, flags in shapes])) for d in (0, 1))
    return Value(tensor_result(step.run()), tuple(dead))


@masked_rule("aten::kron")
def kronecker(step: MaskedStep) -> Value:
    """A product survives where both factors do."""
    alive = {n: (~to_mask(v.tensor.shape, v.dead)).byte() for n, v in step.arguments.items() if isinstance(v, Value)}
    return Value(tensor_result(step.run()), from_mask(tensor_result(step.run(**alive)) == 0))


@masked_rule("aten::cat", "aten::concat", "aten::concatenate")
def cat(step: MaskedStep) -> Value:
    """Put tensors side by side: along the other dimensions they have the same positions."""
    parts: list[Value] = [v for v in step["tensors"] if v.tensor.dim() > 1 or v.tensor.numel() or v.masked]
    rank = parts[0].tensor.dim()
    dim = step.dim("dim", rank)
    joined = vector(torch.cat([_flags(part.dead[dim], part.tensor.size(dim)) for part in parts]))
    dead = [joined if d == dim else union(*(part.dead[d] for part in parts)) for d in range(rank)]
    return Value(tensor_result(step.run()), tuple(dead))


@masked_rule("aten::stack")
def stack(step: MaskedStep) -> Value:
    parts: list[Value] = list(step["tensors"])
    rank = parts[0].tensor.dim()
    dead = [union(*(part.dead[d] for part in parts)) for d in range(rank)]
    dead.insert(step.dim("dim", rank + 1), None)
    return Value(tensor_result(step.run()), tuple(dead))


def _flags(flags: Vector, length: int) -> Tensor:
    return torch.zeros(length, dtype=torch.bool) if flags is None else flags


@masked_rule("aten::slice_scatter", "aten::select_scatter")
def scatter_slice(step: MaskedStep) -> Value:
    """Write over a slice: along the other dimensions both tensors have the same positions."""
    x, source = step["self"], step["src"]
    rank = x.tensor.dim()
    dim = step.dim("dim", rank)
    given = list(source.dead)
    if len(given) < rank:  # select drops the dimension
        given.insert(dim, None)
    dead = [union(a, b) if d != dim else a for d, (a, b) in enumerate(zip(x.dead, given, strict=True))]
    if len(source.dead) < rank or given[dim] is None:
        step.require_whole([given[dim], x.dead[dim]], "the dimension that is written along")
    else:
        written = _flags(None, x.tensor.size(dim))
        length = x.tensor.size(dim)
        written[slice(step["start"], step["end"], step["step"])] = given[dim]
        dead[dim] = vector(_flags(x.dead[dim], length) | written)
    return Value(tensor_result(step.run()), tuple(dead))


@masked_rule("aten::constant_pad_nd", "aten::pad", "aten::zero_pad2d")
def pad(step: MaskedStep) -> Value:
    """Add positions at the ends of dimensions, or take some away. New ones are not removed."""
    x = step.first()
    amounts: Sequence[int] = raw(step["pad"])
    constant = step.arguments.get("mode", "constant") == "constant"
    dead = list(x.dead)
    for pair in range(len(amounts) // 2):
        dim = x.tensor.dim() - 1 - pair
        flags, ends = dead[dim], [int(a) for a in amounts[2 * pair : 2 * pair + 2]]
        if flags is None or ends == [0, 0]:
            continue
        if not constant:
            raise CannotProveError("positions of a dimension that is padded with its own content are removed")
        dead[dim] = vector(torch.nn.functional.pad(flags.to(torch.uint8), ends).bool())
    return Value(tensor_result(step.run()), tuple(dead))


@masked_rule(
    "aten::reflection_pad1d",
    "aten::reflection_pad2d",
    "aten::reflection_pad3d",
    "aten::replication_pad1d",
    "aten::replication_pad2d",
    "aten::replication_pad3d",
)
def pad_with_content(step: MaskedStep) -> Value:
    x = step.first()
    step.require_whole(x.dead[x.tensor.dim() - len(step["padding"]) // 2 :], "a padded dimension")
    return Value(tensor_result(step.run()), x.dead)
