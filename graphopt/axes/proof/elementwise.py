"""Elementwise operators: a position is removed in the result if it is removed in any operand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.axes.proof.step import MaskedStep, masked_rule, tensor_result
from graphopt.axes.proof.value import Dead, Value, broadcast, compact, joined, union
from graphopt.ir.torch_internals import pytree


# `pointwise` is what every operator that torch tags as pointwise falls back to.
@masked_rule(
    "pointwise",
    "aten::__and__",
    "aten::__or__",
    "aten::__xor__",
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
    "aten::absolute",
    "aten::addcdiv",
    "aten::addcmul",
    "aten::alias",
    "aten::alpha_dropout",
    "aten::arccos",
    "aten::arccosh",
    "aten::arcsin",
    "aten::arcsinh",
    "aten::arctan",
    "aten::arctan2",
    "aten::arctanh",
    "aten::chalf",
    "aten::clip",
    "aten::complex",
    "aten::conj",
    "aten::contiguous",
    "aten::cpu",
    "aten::data",
    "aten::detach",
    "aten::divide",
    "aten::dropout",
    "aten::feature_alpha_dropout",
    "aten::feature_dropout",
    "aten::fill",
    "aten::fix",
    "aten::floor_divide",
    "aten::greater",
    "aten::greater_equal",
    "aten::hardswish",
    "aten::imag",
    "aten::isclose",
    "aten::isfinite",
    "aten::isreal",
    "aten::less",
    "aten::less_equal",
    "aten::lift",
    "aten::lift_fresh",
    "aten::lift_fresh_copy",
    "aten::log_sigmoid",
    "aten::masked_fill",
    "aten::multiply",
    "aten::negative",
    "aten::not_equal",
    "aten::polar",
    "aten::real",
    "aten::relu6",
    "aten::resolve_conj",
    "aten::resolve_neg",
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
    "aten::to.device",
    "aten::to.dtype",
    "aten::to.dtype_layout",
    "aten::to.prim_Device",
    "aten::to.prim_dtype",
    "aten::tril",
    "aten::triu",
    "aten::true_divide",
    "aten::where",
    "aten::zero",
    counts=True,
)
def pointwise(step: MaskedStep) -> Any:
    dead, counted = joined(step.values())
    if step.target._schema.is_mutable:
        step.first().counted = counted  # what is written over need no longer be equal all along
    return pytree.tree_map_only(Tensor, lambda result: Value(result, dead, counted), step.run())


@masked_rule(
    "aten::to.other",
    "aten::type_as",
    "aten::empty_like",
    "aten::full_like",
    "aten::ones_like",
    "aten::rand_like",
    "aten::randn_like",
    "aten::zeros_like",
)
def like_first(step: MaskedStep) -> Value:
    """Follow the first operand; another gives no more than its dtype."""
    return Value(tensor_result(step.run()), step.first().dead)


@masked_rule("aten::new_zeros", "aten::new_ones", "aten::new_full", "aten::new_empty")
def new_tensor(step: MaskedStep) -> torch.Tensor:
    """Make a tensor of given size; the operand gives its dtype alone."""
    return tensor_result(step.run())


@masked_rule("aten::sym_size", "aten::sym_numel", "aten::sym_stride", "aten::size", "aten::numel")
def sizes(step: MaskedStep) -> Any:
    """Return numbers: those of the original, whose literals keep their meaning."""
    return step.run()


@masked_rule("aten::copy")
def copy(step: MaskedStep) -> Value:
    """Write one tensor over another: the places are those of both."""
    target, source = step.values()
    return Value(tensor_result(step.run()), broadcast([target.dead, source.dead]))


@masked_rule("aten::prelu")
def prelu(step: MaskedStep) -> Value:
    x, weight = step.values()
    dead = list(x.dead)
    if weight.tensor.numel() > 1 and len(dead) > 1:
        dead[1] = union(dead[1], weight.dead[0])
    return Value(tensor_result(step.run()), tuple(dead))


@masked_rule("aten::glu")
def glu(step: MaskedStep) -> Value:
    """Multiply the first half of a dimension by the sigmoid of the second."""
    x = step.first()
    dim = step.dim("dim", x.tensor.dim())
    dead, flags = list(x.dead), x.dead[dim]
    if flags is not None:
        half = flags.numel() // 2
        dead[dim] = flags[:half] | flags[half:]
    return Value(tensor_result(step.run()), tuple(dead))


@masked_rule("aten::isin", "aten::bucketize")
def among(step: MaskedStep) -> Value:
    """Look up every element in a list by itself."""
    x, *lists = step.values()
    step.require_whole([flags for value in lists for flags in value.dead], "the list")
    return Value(tensor_result(step.run()), x.dead)


@masked_rule(
    "aten::binary_cross_entropy",
    "aten::binary_cross_entropy_with_logits",
    "aten::hinge_embedding_loss",
    "aten::huber_loss",
    "aten::kl_div",
    "aten::l1_loss",
    "aten::margin_ranking_loss",
    "aten::mse_loss",
    "aten::poisson_nll_loss",
    "aten::smooth_l1_loss",
    "aten::soft_margin_loss",
)
def loss(step: MaskedStep) -> Value:
    """Compare element by element and, but for reduction 0, take the sum or the mean over survivors."""
    dead = broadcast(value.dead for value in step.values())
    if not step["reduction"]:
        return Value(tensor_result(step.run()), dead)
    shorter = {
        name: compact(value.tensor, _of_own(value, dead))
        for name, value in step.arguments.items()
        if isinstance(value, Value)
    }
    return Value(tensor_result(step.run(**shorter)), ())


def _of_own(value: Value, dead: Dead) -> Dead:
    """Return what is removed of a result for the dimensions a broadcast operand has itself."""
    own = dead[len(dead) - value.tensor.dim() :]
    return tuple(flags if value.tensor.size(d) > 1 else None for d, flags in enumerate(own))


@masked_rule("aten::view_as_real")
def view_as_real(step: MaskedStep) -> Value:
    return Value(tensor_result(step.run()), (*step.first().dead, None))


@masked_rule("aten::view_as_complex")
def view_as_complex(step: MaskedStep) -> Value:
    x = step.first()
    step.require_whole(x.dead[-1:], "a pair of real and imaginary part")
    return Value(tensor_result(step.run()), x.dead[:-1])
