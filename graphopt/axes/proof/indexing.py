"""Looking up and writing at given positions: those dimensions must be whole, the others pass through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.axes.proof.step import MaskedStep, masked_rule, tensor_result
from graphopt.axes.proof.value import Dead, Value, Vector, broadcast, from_mask, to_mask, union, whole


@masked_rule("aten::embedding", "aten::embedding_bag", "aten::_embedding_bag")
def embedding(step: MaskedStep) -> Any:
    """Look up rows; a bag sums them and returns where bags begin, how long they are and where the largest is too."""
    weight, indices = step["weight"], step["indices"]
    step.require_whole([weight.dead[0]], "the rows of the table")
    result = step.run()
    if isinstance(result, Tensor):
        return Value(result, (*indices.dead, weight.dead[1]))
    step.require_whole([flags for v in step.values() if v is not weight for flags in v.dead], "bags")
    first, *others = result
    wide = first.dim() == others[-1].dim()
    columns: Dead = (None, weight.dead[1])
    return [Value(first, columns), *map(whole, others[:-1]), Value(others[-1], columns) if wide else whole(others[-1])]


@masked_rule("aten::index", "aten::_unsafe_index")
def look_up(step: MaskedStep) -> Value:
    """Fetch by constant or computed positions: the same fetch is made of the mask."""
    x, indices = step["self"], step["indices"]
    given = [index for index in indices if index is not None]
    fetched = from_mask(tensor_result(step.run(self=to_mask(x.tensor.shape, x.dead))))
    if not any(index.masked for index in given):
        return Value(tensor_result(step.run()), fetched)
    for index in given:
        if index.tensor.dtype is torch.bool:
            step.require_whole(index.dead, "a mask that selects")
    dead = list(fetched)
    joint = broadcast(index.dead for index in given)
    places = [d for d, index in enumerate(indices) if index is not None]
    start = places[0] if places == list(range(places[0], places[-1] + 1)) else 0
    for d, flags in enumerate(joint, start):
        dead[d] = union(dead[d], flags)
    return Value(tensor_result(step.run()), tuple(dead))


@masked_rule("aten::index_select")
def select_positions(step: MaskedStep) -> Value:
    x, index = step["self"], step["index"]
    dead, dim = list(x.dead), step.dim("dim", x.tensor.dim())
    step.require_whole(dead[dim : dim + 1], "the dimension that is looked up in")
    if dead:
        dead[dim] = index.dead[0] if index.dead else None
    return Value(tensor_result(step.run()), tuple(dead))


@masked_rule("aten::gather", "aten::take_along_dim")
def gather(step: MaskedStep) -> Value:
    """Dimensions other than the one looked up in have the same positions in both operands."""
    x = step["self"]
    index = step["index"] if "index" in step.arguments else step["indices"]
    dim = step.dim("dim", x.tensor.dim())
    step.require_whole([x.dead[dim]], "the dimension that is looked up in")
    dead = [None if d == dim else flags for d, flags in enumerate(x.dead)]
    for d, flags in enumerate(dead):
        if flags is not None and index.tensor.size(d) != flags.numel():
            dead[d] = flags[: index.tensor.size(d)]
    return Value(tensor_result(step.run()), broadcast([tuple(dead), index.dead]))


@masked_rule(
    "aten::index_add",
    "aten::index_copy",
    "aten::index_fill",
    "aten::index_reduce",
    "aten::scatter",
    "aten::scatter_add",
    "aten::scatter_reduce",
)
def scatter(step: MaskedStep) -> Value:
    """Write along one dimension: the others have the same positions in both tensors."""
    x = step["self"]
    dim = step.dim("dim", x.tensor.dim())
    source = step.get("source") or step.get("src") or step.get("value")
    dead = list(x.dead)
    for given in (source, step.get("index")):
        if given is None or given.tensor.dim() != x.tensor.dim() or given.tensor.dim() == 1:
            continue
        step.require_whole([given.dead[dim]], "the dimension that is written along")
        same = [d for d in range(len(dead)) if d != dim and given.tensor.size(d) == x.tensor.size(d)]
        step.require_whole([f for d, f in enumerate(given.dead) if d not in (*same, dim)], "part of what is written")
        for d in same:
            dead[d] = union(dead[d], given.dead[d])
    step.require_whole([x.dead[dim]], "the dimension that is written along")
    return Value(tensor_result(step.run()), tuple(dead))


@masked_rule("aten::index_put", "aten::_unsafe_index_put")
def index_put(step: MaskedStep) -> Value:
    """Write `values` at positions of the leading dimensions."""
    x, values = step["self"], step["values"]
    indices = [index for index in step["indices"] if index is not None]
    if len(indices) != len(step["indices"]):
        step.require_whole([*x.dead, *values.dead], "a tensor indexed behind a whole dimension")
    for index in indices:
        step.require_whole(index.dead, "the index")
    covered = sum(max(i.tensor.dim(), 1) if i.tensor.dtype is torch.bool else 1 for i in indices)
    step.require_whole(x.dead[:covered], "the dimensions that are indexed")
    rest: list[Vector] = list(x.dead[covered:])
    tail = values.dead[len(values.dead) - len(rest) :] if len(values.dead) >= len(rest) else values.dead
    step.require_whole(values.dead[: len(values.dead) - len(tail)], "part of what is written")
    joined = broadcast([tuple(rest), tail])
    return Value(tensor_result(step.run()), (*x.dead[:covered], *joined))
