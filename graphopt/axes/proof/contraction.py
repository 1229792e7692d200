"""Operators that multiply and sum: a removed position adds nothing to a sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from graphopt.axes.proof.step import MaskedStep, masked_rule, tensor_result
from graphopt.axes.proof.value import Dead, Value, Vector, broadcast, survivors, union, vector, zeroed

Labels = Sequence[str]


def contract(values: Sequence[Value], labels: Sequence[Labels], result: Labels) -> tuple[list[Tensor], Dead]:
    """Zero what is removed from each sum of an einsum over labelled dimensions.

    Returns:
        The operands with removed positions of summed dimensions zeroed, and what is removed in the result.
    """
    joined: dict[str, Vector] = {}
    for value, names in zip(values, labels, strict=True):
        for name, flags in zip(names, value.dead, strict=True):
            joined[name] = union(joined.get(name), flags)
    tensors = [
        zeroed(value.tensor, [None if name in result else joined[name] for name in names])
        for value, names in zip(values, labels, strict=True)
    ]
    return tensors, tuple(joined[name] for name in result)


def _batch(count: int) -> list[str]:
    return [f"batch{count - position}" for position in range(count)]  # numbered from the last: they broadcast


@masked_rule("aten::linear")
def linear(step: MaskedStep) -> Value:
    x, weight, bias = step["input"], step["weight"], step.get("bias")
    batch, out = _batch(x.tensor.dim() - 1), ["out"] * (weight.tensor.dim() - 1)
    tensors, dead = contract([x, weight], [[*batch, "in"], [*out, "in"]], [*batch, *out])
    if bias is not None:
        dead = broadcast([dead, bias.dead])
    return Value(tensor_result(step.run(input=tensors[0], weight=tensors[1])), dead)


@masked_rule("aten::matmul", "aten::mm", "aten::bmm", "aten::mv", "aten::dot", "aten::vdot")
def matmul(step: MaskedStep) -> Value:
    (left, right), dead = _product(*step.values())
    names = [name for name, value in step.arguments.items() if isinstance(value, Value)]
    return Value(tensor_result(step.run(**dict(zip(names, (left, right), strict=True)))), dead)


@masked_rule("aten::addmm", "aten::addbmm", "aten::baddbmm", "aten::addmv")
def addmm(step: MaskedStep) -> Value:
    added, left, right = step.values()
    names = [name for name, value in step.arguments.items() if isinstance(value, Value)]
    tensors, dead = _product(left, right)
    if step.target._schema.name == "aten::addbmm":  # sums over the batch too
        tensors = [zeroed(tensor, dead[:1]) for tensor in tensors]
        dead = dead[1:]
    result = step.run(**dict(zip(names[1:], tensors, strict=True)))
    return Value(tensor_result(result), broadcast([added.dead, dead]))


def _product(left: Value, right: Value) -> tuple[list[Tensor], Dead]:
    a, b = left.tensor.dim(), right.tensor.dim()
    rows, columns = ["row"] * (a > 1), ["column"] * (b > 1)
    batches = [_batch(max(rank - 2, 0)) for rank in (a, b)]
    labels = [[*batches[0], *rows, "sum"], [*batches[1], "sum", *columns]]
    return contract([left, right], labels, [*max(batches, key=len), *rows, *columns])


@masked_rule("aten::_grouped_mm", "transformers::grouped_mm_fallback")
def grouped_product(step: MaskedStep) -> Value:
    """Multiply rows sorted by expert, (rows, in), with the experts' weights (experts, in, out)."""
    (first, x), (second, weight), *_ = [(n, v) for n, v in step.arguments.items() if isinstance(v, Value)]
    if (x.tensor.dim(), weight.tensor.dim()) != (2, 3):
        step.require_whole([*x.dead, *weight.dead], "a grouped product of other ranks than rows by experts")
    step.require_whole([x.dead[0], weight.dead[0]], "the rows or the experts")
    tensors, dead = contract([x, weight], [["row", "sum"], ["expert", "sum", "column"]], ["row", "column"])
    return Value(tensor_result(step.run(**{first: tensors[0], second: tensors[1]})), dead)


@masked_rule("aten::inner")
def inner(step: MaskedStep) -> Value:
    """Sum over the last dimensions, all others of both stay."""
    a, b = step["self"], step["other"]
    if not a.dead or not b.dead:
        return Value(tensor_result(step.run()), broadcast([a.dead, b.dead]))
    left, right = ([f"{side}{d}" for d in range(len(v.dead) - 1)] for side, v in (("a", a), ("b", b)))
    tensors, dead = contract([a, b], [[*left, "sum"], [*right, "sum"]], [*left, *right])
    return Value(tensor_result(step.run(self=tensors[0], other=tensors[1])), dead)


@masked_rule("aten::linalg_vecdot")
def vector_product(step: MaskedStep) -> Value:
    a, b = step["x"], step["y"]
    dead = broadcast([a.dead, b.dead])
    dim = step.dim("dim", len(dead))
    summed = tuple(flags if d == dim else None for d, flags in enumerate(dead))
    x, y = (zeroed(value.tensor, summed[len(dead) - len(value.dead) :]) for value in (a, b))
    return Value(tensor_result(step.run(x=x, y=y)), (*dead[:dim], *dead[dim + 1 :]))


@masked_rule("aten::linalg_multi_dot", "aten::chain_matmul")
def chain(step: MaskedStep) -> Value:
    """Multiply matrices one after the other; the first and the last may be vectors."""
    name = "tensors" if "tensors" in step.arguments else "matrices"
    values: list[Value] = list(step[name])
    labels = [[f"m{i}", f"m{i + 1}"] for i in range(len(values))]
    labels[0] = labels[0][2 - values[0].tensor.dim() :]
    labels[-1] = labels[-1][: values[-1].tensor.dim()]
    ends = [end for end, value in (("m0", values[0]), (f"m{len(values)}", values[-1])) if value.tensor.dim() == 2]
    tensors, dead = contract(values, labels, ends)
    return Value(tensor_result(step.run(**{name: tensors})), dead)


@masked_rule("aten::addr")
def add_outer(step: MaskedStep) -> Value:
    dead = broadcast([step["self"].dead, (*step["vec1"].dead, *step["vec2"].dead)])
    return Value(tensor_result(step.run()), dead)


@masked_rule("aten::outer", "aten::ger")
def outer(step: MaskedStep) -> Value:
    a, b = step.values()
    return Value(tensor_result(step.run()), (*a.dead, *b.dead))


@masked_rule("aten::bilinear")
def bilinear(step: MaskedStep) -> Value:
    x, y, weight, bias = step["input1"], step["input2"], step["weight"], step.get("bias")
    batch = _batch(x.tensor.dim() - 1)
    labels = [[*batch, "left"], [*batch, "right"], ["out", "left", "right"]]
    tensors, dead = contract([x, y, weight], labels, [*batch, "out"])
    if bias is not None:
        dead = broadcast([dead, bias.dead])
    return Value(tensor_result(step.run(**dict(zip(("input1", "input2", "weight"), tensors, strict=True)))), dead)


@masked_rule("aten::tensordot")
def tensordot(step: MaskedStep) -> Value:
    a, b = step["self"], step["other"]
    labels = [[f"a{i}" for i in range(a.tensor.dim())], [f"b{i}" for i in range(b.tensor.dim())]]
    for i, j in zip(step["dims_self"], step["dims_other"], strict=True):
        labels[0][i] = labels[1][j] = f"sum{i}"
    free = [name for names in labels for name in names if not name.startswith("sum")]
    tensors, dead = contract([a, b], labels, free)
    return Value(tensor_result(step.run(self=tensors[0], other=tensors[1])), dead)


@masked_rule("aten::einsum")
def einsum(step: MaskedStep) -> Value:
    operands: list[Value] = list(step["tensors"])
    left, arrow, right = str(step["equation"]).replace(" ", "").partition("->")
    terms = left.split(",")
    labels = [_letters(term, value.tensor.dim()) for term, value in zip(terms, operands, strict=True)]
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        right = "..." * ("..." in left) + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    dots = max((len([name for name in names if len(name) > 1]) for names in labels), default=0)
    width = dots + len(right.replace(".", "")) if "..." in right else len(right)
    tensors, dead = contract(operands, labels, _letters(right, width))
    return Value(tensor_result(step.run(tensors=tensors)), dead)


def _letters(term: str, rank: int) -> list[str]:
    before, dots, after = term.partition("...")
    return [*before, *_batch(rank - len(before) - len(after) if dots else 0), *after]


@masked_rule("aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::convolution")
def convolution(step: MaskedStep) -> Value:
    if step.arguments.get("transposed"):
        return _transposed(step)
    x, weight, bias = step["input"], step["weight"], step.get("bias")
    channel = x.tensor.dim() - weight.tensor.dim() + 1  # 0 where there is no batch
    _require_whole_space(step, x.dead[channel + 1 :])
    result = step.run(
        input=zeroed(x.tensor, _only(x.dead, channel)), weight=zeroed(weight.tensor, _only(weight.dead, 1))
    )
    out = union(weight.dead[0], bias.dead[0] if bias is not None else None)
    return Value(tensor_result(result), _at_channel(x.dead, channel, out))


@masked_rule("aten::conv_transpose1d", "aten::conv_transpose2d", "aten::conv_transpose3d")
def transposed(step: MaskedStep) -> Value:
    """Sum over the first dimension of the weight (in, out / groups, kernel)."""
    return _transposed(step)


def _transposed(step: MaskedStep) -> Value:
    x, weight, bias = step["input"], step["weight"], step.get("bias")
    channel = x.tensor.dim() - weight.tensor.dim() + 1
    _require_whole_space(step, x.dead[channel + 1 :])
    result = step.run(
        input=zeroed(x.tensor, _only(x.dead, channel)), weight=zeroed(weight.tensor, _only(weight.dead, 0))
    )
    groups, inner = int(step["groups"]), weight.tensor.size(1)
    per_group = weight.dead[1].repeat(groups) if weight.dead[1] is not None else None
    lost_groups = None
    if weight.dead[0] is not None:
        lost_groups = vector(weight.dead[0].view(groups, -1).all(1).repeat_interleave(inner))
    out = union(per_group, lost_groups, bias.dead[0] if bias is not None else None)
    return Value(tensor_result(result), _at_channel(x.dead, channel, out))


def _require_whole_space(step: MaskedStep, space: Dead) -> None:
    """Refuse removed positions that a kernel slides over; one of size 1 leaves each position by itself."""
    weight: Value = step["weight"]
    for d, flags in enumerate(space):
        stride, padding = (_of_dim(step.arguments.get(name, default), d) for name, default in _SLIDING)
        if (weight.tensor.size(2 + d), stride, padding) != (1, 1, 0):
            step.require_whole([flags], "a dimension that the kernel slides over")
    step.require_whole(weight.dead[2:], "the kernel's extent")


_SLIDING = (("stride", 1), ("padding", 0))


def _of_dim(option: object, dim: int) -> object:
    """Return an option of one dimension; `same` and `valid` do not pad a kernel of size 1."""
    if isinstance(option, list | tuple):
        return option[dim] if len(option) > dim else option[0]
    return 0 if isinstance(option, str) else option


def _only(dead: Dead, dim: int) -> Dead:
    return tuple(flags if d == dim else None for d, flags in enumerate(dead))


def _at_channel(dead: Dead, channel: int, out: Vector) -> Dead:
    return (*dead[:channel], out, *dead[channel + 1 :])


@masked_rule("aten::scaled_dot_product_attention")
def attention(step: MaskedStep) -> Value:
    """softmax(q k^T * scale + mask) v over surviving keys; the default scale is that of the original width."""
    q, k, v, bias = step["query"], step["key"], step["value"], step.get("attn_mask")
    keys = union(k.dead[-2], v.dead[-2], *(bias.dead[-1:] if bias is not None else ()))
    if step["is_causal"]:
        step.require_whole([keys, q.dead[-2]], "tokens in causal order")
    inner = union(q.dead[-1], k.dead[-1])
    heads = [_heads(value, q) for value in (k, v)]
    # As (batch.., query, 1): the mask's dimensions broadcast against those.
    rows = [(*q.dead[:-1], None), *((*dead, None, None) for dead in heads)]
    if bias is not None:
        rows.append((*bias.dead[:-1], None))
    joined = broadcast(rows)
    scale = step["scale"] if step["scale"] is not None else 1 / math.sqrt(q.tensor.size(-1))
    last: Dead = (*((None,) * (q.tensor.dim() - 1)), inner)
    shorter = {"query": zeroed(q.tensor, last), "key": _rows(zeroed(k.tensor, last), keys, -2)}
    shorter["value"] = _rows(v.tensor, keys, -2)
    if bias is not None:
        shorter["attn_mask"] = _rows(bias.tensor, keys, -1)
    result = step.run(**shorter, scale=scale)
    return Value(tensor_result(result), (*joined[:-1], v.dead[-1]))


def _rows(tensor: Tensor, removed: Vector, dim: int) -> Tensor:
    """Take removed positions out of one dimension; one of size 1 is broadcast and stays."""
    if removed is None or not tensor.dim() or tensor.size(dim) == 1:
        return tensor
    return tensor.index_select(dim, survivors(removed))


def _heads(value: Value, query: Value) -> Dead:
    """Return what is removed of the batch dimensions, key heads repeated for the query heads they serve."""
    dead = list(value.dead[:-2])
    if dead and dead[-1] is not None and value.tensor.size(-3) != query.tensor.size(-3):
        dead[-1] = dead[-1].repeat_interleave(query.tensor.size(-3) // value.tensor.size(-3))
    return tuple(dead)


@masked_rule("aten::_weight_norm", "aten::_weight_norm_interface")
def weight_norm(step: MaskedStep) -> Any:
    """Scale v / |v| by g, the norm over all dimensions but `dim`; the interface returns the norms too."""
    v, g = step["v"], step["g"]
    dim = step.dim("dim", v.tensor.dim())
    summed = tuple(None if d == dim else flags for d, flags in enumerate(v.dead))
    result = step.run(v=zeroed(v.tensor, summed))
    dead = broadcast([v.dead, g.dead])
    if isinstance(result, Tensor):
        return Value(result, dead)
    return [Value(result[0], dead), Value(result[1], g.dead)]


@masked_rule("aten::cdist")
def cdist(step: MaskedStep) -> Value:
    a, b = step["x1"], step["x2"]
    tensors, _ = contract(
        [a, b],
        [[*_batch(a.tensor.dim() - 2), "row", "sum"], [*_batch(b.tensor.dim() - 2), "column", "sum"]],
        [*_batch(max(a.tensor.dim(), b.tensor.dim()) - 2), "row", "column"],
    )
    dead = (*broadcast([a.dead[:-2], b.dead[:-2]]), a.dead[-2], b.dead[-2])
    return Value(tensor_result(step.run(x1=tensors[0], x2=tensors[1])), dead)
