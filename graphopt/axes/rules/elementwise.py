"""Elementwise operators: operands aligned at their last dimension, equal sizes are the same positions."""

from __future__ import annotations

from graphopt.axes.call import Call
from graphopt.axes.layout import Dims
from graphopt.axes.registry import rule


# `pointwise` is what every operator that torch tags as pointwise falls back to.
@rule(
    "pointwise",
    "aten::__and__",
    "aten::__ior__",
    "aten::__or__",
    "aten::__xor__",
    "aten::absolute",
    "aten::arctan2",
    "aten::clip",
    "aten::complex",
    "aten::divide",
    "aten::floor_divide",
    "aten::greater",
    "aten::greater_equal",
    "aten::hardswish",
    "aten::isclose",
    "aten::isfinite",
    "aten::isreal",
    "aten::less",
    "aten::less_equal",
    "aten::log_sigmoid",
    "aten::masked_fill",
    "aten::multiply",
    "aten::not_equal",
    "aten::polar",
    "aten::relu6",
    "aten::rsub",
    "aten::special_digamma",
    "aten::special_erf",
    "aten::special_erfc",
    "aten::special_erfinv",
    "aten::special_exp2",
    "aten::special_expit",
    "aten::special_expm1",
    "aten::special_gammainc",
    "aten::special_gammaincc",
    "aten::special_gammaln",
    "aten::special_i0",
    "aten::special_log1p",
    "aten::special_logit",
    "aten::special_multigammaln",
    "aten::special_ndtr",
    "aten::special_polygamma",
    "aten::special_psi",
    "aten::special_round",
    "aten::special_sinc",
    "aten::special_xlogy",
    "aten::subtract",
    "aten::true_divide",
    "aten::where.Scalar",
    "aten::where.ScalarOther",
    "aten::where.ScalarSelf",
)
def elementwise(call: Call) -> Dims | list[Dims | None]:
    dims = call.broadcast(call.tensors())
    several = call.node.meta["val"]  # frexp has two results
    return [dims for _ in several] if isinstance(several, list | tuple) else dims


@rule(
    "aten::_cast_Byte",
    "aten::_cast_Char",
    "aten::_cast_Double",
    "aten::_cast_Float",
    "aten::_cast_Half",
    "aten::_cast_Int",
    "aten::_cast_Long",
    "aten::_cast_Short",
    "aten::_conj",
    "aten::_neg_view",
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
    "aten::chalf",
    "aten::clone",
    "aten::conj",
    "aten::contiguous",
    "aten::cpu",
    "aten::data",
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
    "aten::nan_to_num",
    "aten::negative",
    "aten::ones_like",
    "aten::rand_like",
    "aten::randint_like",
    "aten::randn_like",
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
