"""Operators that only move elements: the same move is made with the mask of removed elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.axes.oracle.step import Step, masked_rule, raw, tensor_result
from graphopt.axes.oracle.value import CannotProveError, Value, Vector, from_mask, to_mask, union, vector


@masked_rule(
    "aten::_reshape_alias",
    "aten::_unsafe_view",
    "aten::broadcast_to",
    "aten::channel_shuffle",
    "aten::chunk",
    "aten::diagonal",
    "aten::diag_embed",
    "aten::expand",
    "aten::expand_as",
    "aten::flatten",
    "aten::flip",
    "aten::fliplr",
    "aten::flipud",
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
)
def move(step: Step) -> Any:
    """Make the same move with the mask of the first operand."""
    name, x = step.first_name(), step.first()
    mask = to_mask(x.tensor.shape, x.dead)
    moved = step.run(**{name: mask})
    return _paired(step.run(), moved)


def _paired(result: Any, moved: Any) -> Any:
    tensors, structure = pytree.tree_flatten(result)
    values = [Value(t, from_mask(m)) for t, m in zip(tensors, pytree.tree_leaves(moved), strict=True)]
    return pytree.tree_unflatten(values, structure)


@masked_rule("aten::cat", "aten::concat", "aten::concatenate")
def cat(step: Step) -> Value:
    """Put tensors side by side: along the other dimensions they have the same positions."""
    parts: list[Value] = [v for v in step["tensors"] if v.tensor.dim() > 1 or v.tensor.numel() or v.masked]
    rank = parts[0].tensor.dim()
    dim = step.dim("dim", rank)
    joined = vector(torch.cat([_flags(part.dead[dim], part.tensor.size(dim)) for part in parts]))
    dead = [joined if d == dim else union(*(part.dead[d] for part in parts)) for d in range(rank)]
    return Value(tensor_result(step.run()), tuple(dead))


@masked_rule("aten::stack")
def stack(step: Step) -> Value:
    parts: list[Value] = list(step["tensors"])
    rank = parts[0].tensor.dim()
    dead = [union(*(part.dead[d] for part in parts)) for d in range(rank)]
    dead.insert(step.dim("dim", rank + 1), None)
    return Value(tensor_result(step.run()), tuple(dead))


def _flags(flags: Vector, length: int) -> Tensor:
    return torch.zeros(length, dtype=torch.bool) if flags is None else flags


@masked_rule("aten::slice_scatter", "aten::select_scatter")
def scatter_slice(step: Step) -> Value:
    """Write over a slice: along the other dimensions both tensors have the same positions."""
    x, source = step["self"], step["src"]
    rank = x.tensor.dim()
    dim = step.dim("dim", rank)
    given = list(source.dead)
    if len(given) < rank:  # select drops the dimension
        given.insert(dim, None)
    dead = [union(a, b) if d != dim else a for d, (a, b) in enumerate(zip(x.dead, given, strict=True))]
    step.require_whole([given[dim], x.dead[dim]], "the dimension that is written along")
    return Value(tensor_result(step.run()), tuple(dead))


@masked_rule("aten::constant_pad_nd", "aten::pad", "aten::zero_pad2d")
def pad(step: Step) -> Value:
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
def pad_with_content(step: Step) -> Value:
    x = step.first()
    step.require_whole(x.dead[x.tensor.dim() - len(step["padding"]) // 2 :], "a padded dimension")
    return Value(tensor_result(step.run()), x.dead)
