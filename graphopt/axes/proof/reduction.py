"""Reductions and normalisations: taken over the positions that survive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional

from graphopt.axes.proof.step import MaskedStep, masked_rule, tensor_result
from graphopt.axes.proof.value import (
    Dead,
    Value,
    Vector,
    broadcast,
    compact,
    from_mask,
    known_or_counted,
    spread,
    to_mask,
    union,
    zeroed,
)
from graphopt.ir.torch_internals import pytree


def _along(dead: Sequence[Vector], dims: Sequence[int]) -> Dead:
    """Return the vectors of the given dimensions alone."""
    return tuple(flags if dim in dims else None for dim, flags in enumerate(dead))


@masked_rule(
    "aten::_is_all_true",
    "aten::_is_any_true",
    "aten::all",
    "aten::amax",
    "aten::amin",
    "aten::aminmax",
    "aten::any",
    "aten::count_nonzero",
    "aten::frobenius_norm",
    "aten::linalg_norm",
    "aten::linalg_vector_norm",
    "aten::logsumexp",
    "aten::mean",
    "aten::nanmean",
    "aten::nansum",
    "aten::norm",
    "aten::prod",
    "aten::std",
    "aten::std_mean",
    "aten::sum",
    "aten::var",
    "aten::var_mean",
    "aten::max",
    "aten::median",
    "aten::min",
    "aten::nanmedian",
    "aten::special_logsumexp",
    counts=True,
)
def reduce(step: MaskedStep) -> Any:
    """Reduce what survives along the reduced dimensions; the others stay as they are."""
    x = step.first()
    rank = x.tensor.dim()
    dims = step.dims("dim", rank)
    result = step.run(**{step.first_name(): compact(x.tensor, _along(known_or_counted(x), dims))})
    keep = bool(step.arguments.get("keepdim", False))
    left = [d for d in range(rank) if keep or d not in dims]
    dead = tuple(None if d in dims else x.dead[d] for d in left)
    counted = {place: x.counted[d] for place, d in enumerate(left) if d in x.counted and d not in dims}
    return pytree.tree_map_only(Tensor, lambda t: Value(t, dead, counted), result)


@masked_rule("aten::sum_to_size")
def sum_to_size(step: MaskedStep) -> Value:
    """Sum dimensions in front and those that shall have size 1."""
    x, wanted = step.first(), list(step["size"])
    front = x.tensor.dim() - len(wanted)
    dims = [d for d in range(x.tensor.dim()) if d < front or wanted[d - front] == 1]
    shorter = zeroed(x.tensor, _along(x.dead, dims))
    dead = tuple(None if d in dims else flags for d, flags in enumerate(x.dead))[front:]
    return Value(tensor_result(step.run(self=shorter)), dead)


@masked_rule(
    "aten::max.dim",
    "aten::min.dim",
    "aten::argmax",
    "aten::argmin",
    "aten::median.dim",
    "aten::nanmedian.dim",
    "aten::mode",
)
def reduce_to_position(step: MaskedStep) -> Any:
    """Return positions too: they would not be the same after a removal along the dimension."""
    x = step.first()
    dims = step.dims("dim", x.tensor.dim())
    step.require_whole(_along(x.dead, dims), "the dimension whose positions are returned")
    return reduce(step)


@masked_rule("aten::max.other", "aten::min.other")
def larger(step: MaskedStep) -> Value:
    a, b = step.values()
    return Value(
        tensor_result(step.run()), from_mask(to_mask(a.tensor.shape, a.dead) | to_mask(b.tensor.shape, b.dead))
    )


@masked_rule(
    "aten::_log_softmax",
    "aten::_safe_softmax",
    "aten::_softmax",
    "aten::cumprod",
    "aten::cumsum",
    "aten::log_softmax",
    "aten::logcumsumexp",
    "aten::softmax",
    "aten::softmin",
    "aten::special_log_softmax",
    "aten::special_softmax",
    counts=True,
)
def keep_shape(step: MaskedStep) -> Value:
    """Run along what survives of the dimension and put the results back at their places."""
    x = step.first()
    dead = _along(known_or_counted(x), step.dims("dim", x.tensor.dim()))
    result = tensor_result(step.run(**{step.first_name(): compact(x.tensor, dead)}))
    # Equal elements have equal results (but for a cumulative sum, which then no longer has equal elements).
    again = {d: flags for d, flags in x.counted.items() if d not in step.dims("dim", x.tensor.dim())}
    if "cum" in step.target._schema.name:
        return Value(spread(result, dead), x.dead, again)
    return Value(_refilled(result, x.tensor.shape, dead, x), x.dead, x.counted)


def _refilled(result: Tensor, shape: Sequence[int], dead: Dead, x: Value) -> Tensor:
    """Put results back at their places; where positions are only counted, one of the equal results at every place."""
    for d, flags in enumerate(dead):
        if flags is not None and x.dead[d] is None:
            result = result.narrow(d, 0, 1).expand([shape[d] if e == d else n for e, n in enumerate(result.shape)])
    return spread(result, _along(x.dead, [d for d, flags in enumerate(dead) if flags is not None]))


@masked_rule("aten::sort", "aten::argsort", "aten::topk", "aten::kthvalue", "aten::cummax", "aten::cummin")
def along_whole(step: MaskedStep) -> Any:
    x = step.first()
    dim = step.dim("dim", x.tensor.dim())
    step.require_whole([x.dead[dim]], "the dimension that is ordered")
    result = step.run()
    dead = x.dead

    def wrap(tensor: Tensor) -> Value:
        return Value(tensor, dead if tensor.dim() == len(dead) else (*dead[:dim], *dead[dim + 1 :]))

    return pytree.tree_map_only(Tensor, wrap, result)


@masked_rule("aten::layer_norm", "aten::rms_norm", "aten::native_layer_norm")
def layer_norm(step: MaskedStep) -> Value:
    x, weight, bias = step["input"], step.get("weight"), step.get("bias")
    count = len(step["normalized_shape"])
    lead: Dead = (None,) * (x.tensor.dim() - count)
    dead = [
        union(*column) for column in zip(*(v.dead[-count:] for v in (x, weight, bias) if v is not None), strict=True)
    ]
    shortened: dict[str, Any] = {"input": compact(x.tensor, [*lead, *dead])}
    shortened["normalized_shape"] = list(shortened["input"].shape[-count:])
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            shortened[name] = compact(value.tensor, dead)
    result = pytree.tree_leaves(step.run(**shortened))
    out = Value(spread(result[0], [*lead, *dead]), (*x.dead[:-count], *dead))
    if len(result) == 1:
        return out
    statistics: Dead = (*x.dead[:-count], *((None,) * count))
    return [out, *(Value(tensor, statistics) for tensor in result[1:])]  # type: ignore[return-value]


@masked_rule("aten::group_norm")
def group_norm(step: MaskedStep) -> Value:
    """Normalise (channels / groups, space) of each group, then scale per channel."""
    x, weight, bias = step["input"], step.get("weight"), step.get("bias")
    groups = int(step["num_groups"])
    shape = x.tensor.shape
    channels = union(*(v.dead[d] for v, d in ((x, 1), (weight, 0), (bias, 0)) if v is not None))
    split = (shape[0], groups, shape[1] // groups, *shape[2:])
    parts: Dead = (None,) * len(split)
    if channels is not None:
        of_group, inside = from_mask(channels.view(split[1:3]))
        parts = (None, of_group, inside, *parts[3:])
    parts = (*parts[:3], *x.dead[2:])
    left = compact(x.tensor.reshape(split), parts)
    normal = functional.group_norm(left.flatten(1, 2), left.size(1), eps=float(step["eps"])).view(left.shape)
    result = spread(normal, parts).reshape(shape)
    per_channel = (1, -1, *(1 for _ in shape[2:]))
    if weight is not None:
        result = result * weight.tensor.view(per_channel)
    if bias is not None:
        result = result + bias.tensor.view(per_channel)
    return Value(result, (x.dead[0], channels, *x.dead[2:]))


@masked_rule(
    "aten::batch_norm",
    "aten::instance_norm",
    "aten::cudnn_batch_norm",
    "aten::native_batch_norm",
    "aten::_native_batch_norm_legit",
    "aten::_native_batch_norm_legit_functional",
    "aten::_native_batch_norm_legit_no_training",
)
def per_channel_norm(step: MaskedStep) -> Any:
    """Statistics of each channel are its own: nothing crosses channels. They are given, or taken over survivors."""
    x, *others = step.values()
    dead: Dead = (x.dead[0], union(x.dead[1], *(v.dead[0] for v in others)), *x.dead[2:])
    rest: Dead = (dead[0], None, *dead[2:])  # what statistics are taken over
    result = step.run(**{step.first_name(): compact(x.tensor, rest)})
    if isinstance(result, Tensor):
        return Value(spread(result, rest), dead)
    out, *statistics = result
    return [Value(spread(out, rest), dead), *(Value(t, (dead[1],) if t.numel() else (None,)) for t in statistics)]


@masked_rule("aten::cosine_similarity", "aten::pairwise_distance")
def compare_vectors(step: MaskedStep) -> Value:
    a, b = step.values()
    joined = broadcast([a.dead, b.dead])
    dim = step.dim("dim", len(joined)) if "dim" in step.arguments else len(joined) - 1
    names = [name for name, value in step.arguments.items() if isinstance(value, Value)]
    along = _along(joined, [dim])
    tensors = [compact(value.tensor, along[len(along) - value.tensor.dim() :]) for value in (a, b)]
    result = tensor_result(step.run(**dict(zip(names, tensors, strict=True))))
    kept: Dead = (None,) if result.dim() == len(joined) else ()
    return Value(result, (*joined[:dim], *kept, *joined[dim + 1 :]))
