"""Elementwise operators: operands aligned at their last dimension, equal sizes are the same positions."""

from __future__ import annotations

from graphopt.axes.call import Call
from graphopt.axes.registry import Dims, rule


# `pointwise` is what every operator that torch tags as pointwise falls back to.
@rule(
    "pointwise",
    "aten::__and__",
    "aten::__ior__",
    "aten::__or__",
    "aten::__xor__",
    "aten::clip",
    "aten::divide",
    "aten::floor_divide",
    "aten::greater",
    "aten::greater_equal",
    "aten::hardswish",
    "aten::isfinite",
    "aten::isreal",
    "aten::less",
    "aten::less_equal",
    "aten::log_sigmoid",
    "aten::masked_fill",
    "aten::multiply",
    "aten::not_equal",
    "aten::relu6",
    "aten::subtract",
    "aten::where.ScalarSelf",
    "aten::where.ScalarOther",
    "aten::where.Scalar",
)
def elementwise(call: Call) -> Dims:
    return call.broadcast(call.tensors())


@rule(
    "aten::_to_copy",
    "aten::alias",
    "aten::alpha_dropout",
    "aten::arccos",
    "aten::arccosh",
    "aten::arcsin",
    "aten::arcsinh",
    "aten::arctan",
    "aten::arctanh",
    "aten::bernoulli.p",
    "aten::clone",
    "aten::contiguous",
    "aten::detach",
    "aten::dropout",
    "aten::empty_like",
    "aten::feature_alpha_dropout",
    "aten::feature_dropout",
    "aten::fix",
    "aten::full_like",
    "aten::imag",
    "aten::lift_fresh",
    "aten::lift_fresh_copy",
    "aten::negative",
    "aten::ones_like",
    "aten::real",
    "aten::resolve_conj",
    "aten::resolve_neg",
    "aten::to",
    "aten::type_as",
    "aten::zero",
    "aten::zeros_like",
)
def one_operand(call: Call) -> Dims:
    """Follow the first argument; others (a dtype's donor) have no say in the positions."""
    return call.tensors()[0]


@rule("aten::copy", "aten::fill")
def into_first(call: Call) -> Dims:
    """Write the second operand, broadcast, over the first."""
    target, *values = call.tensors()
    call.broadcast([target, *values])
    return target


@rule("aten::prelu")
def prelu(call: Call) -> Dims:
    """Scale negative values per channel: the weight runs along dimension 1."""
    dims, weight = call.dims("self"), call.dims("weight")
    if len(dims) > 1 and weight:
        call.unify(dims[1], weight[0])
    return dims


@rule("aten::view_as_real")
def view_as_real(call: Call) -> Dims:
    return (*call.dims("self"), call.axis(2, call.because("real and imaginary parts")))


@rule("aten::view_as_complex")
def view_as_complex(call: Call) -> Dims:
    *dims, pair = call.dims("self")
    call.freeze(pair, "real and imaginary parts")
    return tuple(dims)
