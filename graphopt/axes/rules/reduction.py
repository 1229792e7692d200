"""Reductions drop a dimension or keep it at size 1; what survives of it is what they are taken over."""

from __future__ import annotations

from graphopt.axes.call import Call
from graphopt.axes.layout import ONE, Dims
from graphopt.axes.registry import rule


@rule(
    "aten::_is_all_true",
    "aten::_is_any_true",
    "aten::all",
    "aten::amax",
    "aten::amin",
    "aten::any",
    "aten::count_nonzero",
    "aten::frobenius_norm",
    "aten::linalg_norm",
    "aten::linalg_vector_norm",
    "aten::logsumexp",
    "aten::max",
    "aten::mean",
    "aten::min",
    "aten::nanmean",
    "aten::nanmedian",
    "aten::median",
    "aten::nansum",
    "aten::norm",
    "aten::prod",
    "aten::special_logsumexp",
    "aten::std",
    "aten::sum",
    "aten::var",
)
def reduce(call: Call) -> Dims:
    return _reduced(call, call.tensors()[0])


def _reduced(call: Call, dims: Dims) -> Dims:
    named = "dim" if "dim" in call.names() else None
    positions = call.positions(named, len(dims)) if named and dims else list(range(len(dims)))
    if "keepdim" in call.names() and call.arg("keepdim"):
        return tuple(ONE if d in positions else layout for d, layout in enumerate(dims))
    return tuple(layout for d, layout in enumerate(dims) if d not in positions)


@rule("aten::max.other", "aten::min.other", "aten::maximum", "aten::minimum")
def elementwise_extreme(call: Call) -> Dims:
    return call.broadcast(call.tensors())


@rule("aten::aminmax", "aten::std_mean", "aten::var_mean")
def two_statistics(call: Call) -> list[Dims | None]:
    result = _reduced(call, call.dims("self" if call.has("self") else "input"))
    return [result, result]


@rule(
    "aten::cummax",
    "aten::cummin",
    "aten::kthvalue",
    "aten::max.dim",
    "aten::median.dim",
    "aten::min.dim",
    "aten::mode",
    "aten::nanmedian.dim",
)
def extreme_and_where(call: Call) -> list[Dims | None]:
    """The second result holds positions, which mean something only while the dimension is whole."""
    dims = call.dims("self")
    if dims:
        call.freeze(dims[call.position("dim", len(dims))], "positions are returned")
    result = dims if len(call.shape(0)) == len(dims) and "keepdim" not in call.names() else _reduced(call, dims)
    return [result, result]


@rule("aten::argmax", "aten::argmin")
def position_of_extreme(call: Call) -> Dims:
    dims = call.dims("self")
    named = call.arg("dim")
    call.freeze(dims if named is None else dims[named], "positions are returned")
    if named is None:
        return tuple(ONE for _ in call.shape())
    return _reduced(call, dims)


@rule(
    "aten::_log_softmax",
    "aten::_safe_softmax",
    "aten::_softmax",
    "aten::cumprod",
    "aten::cumsum",
    "aten::log_softmax",
    "aten::logcumsumexp",
    "aten::softmax",
    "aten::special_log_softmax",
    "aten::special_softmax",
)
def over_survivors(call: Call) -> Dims:
    return call.dims("self")


@rule(
    "aten::flip",
    "aten::roll",
    "aten::argsort",
)
def ordered(call: Call) -> Dims:
    """The result at one position depends on the order of all of them."""
    dims = call.dims("self")
    name = "dims" if "dims" in call.names() else "dim"
    for d in call.positions(name, len(dims)):
        call.freeze(dims[d], "the order of positions matters")
    return dims


@rule("aten::tril", "aten::triu")
def triangle(call: Call) -> Dims:
    dims = call.dims("self")
    call.freeze(dims[-2:], "the order of positions matters")
    return dims


@rule("aten::sort")
def sort(call: Call) -> list[Dims | None]:
    dims = call.dims("self")
    call.freeze(dims[call.position("dim", len(dims))], "the order of positions matters")
    return [dims, dims]


@rule("aten::topk")
def topk(call: Call) -> list[Dims | None]:
    dims = list(call.dims("self"))
    along = call.position("dim", len(dims))
    call.freeze(dims[along], "the largest positions are taken out")
    dims[along] = call.axis(call.shape(0)[along], call.because("the largest positions"))
    return [tuple(dims), tuple(dims)]
