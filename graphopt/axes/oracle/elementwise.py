"""Elementwise operators: a position is removed in the result if it is removed in any operand."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.axes.oracle.step import Step, masked_rule, tensor_result
from graphopt.axes.oracle.value import Value, broadcast, union


# `pointwise` is what every operator that torch tags as pointwise falls back to.
@masked_rule(
    "pointwise",
    "aten::__and__",
    "aten::__or__",
    "aten::__xor__",
    "aten::addcdiv",
    "aten::addcmul",
    "aten::alias",
    "aten::alpha_dropout",
    "aten::clip",
    "aten::complex",
    "aten::contiguous",
    "aten::detach",
    "aten::divide",
    "aten::dropout",
    "aten::feature_dropout",
    "aten::feature_alpha_dropout",
    "aten::floor_divide",
    "aten::greater",
    "aten::greater_equal",
    "aten::hardswish",
    "aten::imag",
    "aten::isfinite",
    "aten::less",
    "aten::less_equal",
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
    "aten::rsub",
    "aten::subtract",
    "aten::true_divide",
    "aten::where",
    "aten::_to_copy",
    "aten::to.device",
    "aten::to.dtype",
    "aten::to.dtype_layout",
    "aten::tril",
    "aten::triu",
    "aten::fill",
    "aten::zero",
)
def pointwise(step: Step) -> Value:
    dead = broadcast(value.dead for value in step.values())
    return Value(tensor_result(step.run()), dead)


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
def like_first(step: Step) -> Value:
    """Follow the first operand; another gives no more than its dtype."""
    return Value(tensor_result(step.run()), step.first().dead)


@masked_rule("aten::new_zeros", "aten::new_ones", "aten::new_full", "aten::new_empty")
def new_tensor(step: Step) -> torch.Tensor:
    """Make a tensor of given size; the operand gives its dtype alone."""
    return tensor_result(step.run())


@masked_rule("aten::sym_size", "aten::sym_numel", "aten::sym_stride", "aten::size", "aten::numel")
def sizes(step: Step) -> Any:
    """Return numbers: those of the original, whose literals keep their meaning."""
    return step.run()


@masked_rule("aten::copy")
def copy(step: Step) -> Value:
    """Write one tensor over another: the places are those of both."""
    target, source = step.values()
    return Value(tensor_result(step.run()), broadcast([target.dead, source.dead]))


@masked_rule("aten::prelu")
def prelu(step: Step) -> Value:
    x, weight = step.values()
    dead = list(x.dead)
    if weight.tensor.numel() > 1 and len(dead) > 1:
        dead[1] = union(dead[1], weight.dead[0])
    return Value(tensor_result(step.run()), tuple(dead))


@masked_rule("aten::glu")
def glu(step: Step) -> Value:
    """Multiply the first half of a dimension by the sigmoid of the second."""
    x = step.first()
    dim = step.dim("dim", x.tensor.dim())
    dead, flags = list(x.dead), x.dead[dim]
    if flags is not None:
        half = flags.numel() // 2
        dead[dim] = flags[:half] | flags[half:]
    return Value(tensor_result(step.run()), tuple(dead))


@masked_rule("aten::view_as_real")
def view_as_real(step: Step) -> Value:
    return Value(tensor_result(step.run()), (*step.first().dead, None))


@masked_rule("aten::view_as_complex")
def view_as_complex(step: Step) -> Value:
    x = step.first()
    step.require_whole(x.dead[-1:], "a pair of real and imaginary part")
    return Value(tensor_result(step.run()), x.dead[:-1])
