"""Looking up and writing at given positions: those dimensions must be whole, the others pass through."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.axes.oracle.step import Step, masked_rule, tensor_result
from graphopt.axes.oracle.value import Value, Vector, broadcast, from_mask, to_mask, union


@masked_rule("aten::embedding", "aten::embedding_bag")
def embedding(step: Step) -> Value:
    weight, indices = step["weight"], step["indices"]
    step.require_whole([weight.dead[0]], "the rows of the table")
    result = step.run()
    out = tensor_result(result if isinstance(result, Tensor) else result[0])
    lead = indices.dead if len(indices.dead) == out.dim() - 1 else (None,) * (out.dim() - 1)
    return Value(out, (*lead, weight.dead[1]))


@masked_rule("aten::index_select", "aten::index")
def look_up(step: Step) -> Value:
    """Fetch by constant or computed positions: the same fetch is made of the mask."""
    x = step["self"]
    indices = step["index"] if "index" in step.arguments else step["indices"]
    given = [index for index in (indices if isinstance(indices, list | tuple) else [indices]) if index is not None]
    for index in given:
        step.require_whole(index.dead, "the index")
    moved = step.run(self=to_mask(x.tensor.shape, x.dead))
    return Value(tensor_result(step.run()), from_mask(tensor_result(moved)))


@masked_rule("aten::gather", "aten::take_along_dim")
def gather(step: Step) -> Value:
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
    "aten::scatter",
    "aten::scatter_add",
    "aten::scatter_reduce",
)
def scatter(step: Step) -> Value:
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
def index_put(step: Step) -> Value:
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
