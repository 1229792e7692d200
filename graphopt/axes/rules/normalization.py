"""Normalisations: statistics over a dimension keep it an axis; they are taken over what survives."""

from __future__ import annotations

from graphopt.axes.call import Call
from graphopt.axes.edit import Edit
from graphopt.axes.layout import ONE, Dims, product
from graphopt.axes.registry import rule


def _per_channel(call: Call, dims: Dims, channel: int) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.has(name):
            call.unify(dims[channel], call.dims(name)[0])


@rule("aten::batch_norm", "aten::instance_norm")
def channel_statistics(call: Call) -> Dims:
    dims = call.dims("input")
    _per_channel(call, dims, 1)
    return dims


@rule(
    "aten::_native_batch_norm_legit",
    "aten::_native_batch_norm_legit_functional",
    "aten::_native_batch_norm_legit_no_training",
    "aten::native_batch_norm",
    "aten::cudnn_batch_norm",
)
def native_batch_norm(call: Call) -> list[Dims | None]:
    dims = call.dims("input")
    _per_channel(call, dims, 1)
    results: list[Dims | None] = [dims]
    for index in range(1, len(call.node.meta["val"])):  # statistics of the channels, or none: of shape (0,)
        shape = call.shape(index)
        per_channel = len(shape) == 1 and call.sized(dims[1], shape[0])
        results.append((dims[1],) if per_channel else call.axes(shape))
    return results


def rewrite_shape(edit: Edit) -> None:
    """Bring normalized_shape up to date."""
    given = edit.arg("normalized_shape")
    edit.set("normalized_shape", edit.sizes(edit.dims("input")[-len(given) :], given))


@rule("aten::layer_norm", "aten::rms_norm", rewrite=rewrite_shape, resizes=True)
def trailing_statistics(call: Call) -> Dims:
    return _trailing(call)


def _trailing(call: Call) -> Dims:
    dims = call.dims("input")
    for name in ("weight", "bias"):
        if name in call.names() and call.has(name):
            call.broadcast([dims, call.dims(name)])
    return dims


@rule("aten::native_layer_norm", rewrite=rewrite_shape, resizes=True)
def native_layer_norm(call: Call) -> list[Dims | None]:
    dims = _trailing(call)
    cut = len(dims) - len(call.arg("normalized_shape"))
    statistics = tuple(ONE if d >= cut else layout for d, layout in enumerate(dims))
    return [dims, statistics, statistics]


def rewrite_groups(edit: Edit) -> None:
    """Bring the number of groups up to date."""
    edit.set("num_groups", edit.new_size(edit.note("groups")))


@rule("aten::group_norm", rewrite=rewrite_groups)
def group_norm(call: Call) -> Dims:
    dims = call.dims("input")
    groups = call.axis(int(call.arg("num_groups")))
    call.note("groups", groups)
    per_group = call.axis(call.ratio(dims[1], groups))
    call.unify(dims[1], product([groups, per_group]))
    _per_channel(call, dims, 1)
    return dims


@rule("aten::_weight_norm")
def weight_norm(call: Call) -> Dims:
    """Scale v to norm g over every dimension but one."""
    return _weight_norm(call)


def _weight_norm(call: Call) -> Dims:
    return call.broadcast([call.dims("v"), call.dims("g")])


@rule("aten::_weight_norm_interface")
def weight_norm_interface(call: Call) -> list[Dims | None]:
    return [_weight_norm(call), call.dims("g")]


@rule("aten::cosine_similarity", "aten::pairwise_distance")
def compare(call: Call) -> Dims:
    dims = call.broadcast(call.tensors())
    along = call.position("dim", len(dims)) if "dim" in call.names() else len(dims) - 1
    call.sums(dims[along])
    keep = "keepdim" in call.names() and call.arg("keepdim")
    return (*dims[:along], *((ONE,) if keep else ()), *dims[along + 1 :])
