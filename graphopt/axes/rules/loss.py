"""Losses: elementwise on operands of one shape, then reduced or not; those over classes or vectors keep all whole."""

from __future__ import annotations

from graphopt.axes.call import Call
from graphopt.axes.layout import Dims
from graphopt.axes.registry import rule


@rule(
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
def pointwise_loss(call: Call) -> Dims:
    dims = call.broadcast(call.tensors())
    return dims if call.shape() else ()


@rule(
    "aten::cross_entropy_loss",
    "aten::nll_loss",
    "aten::nll_loss2d",
    "aten::nll_loss_nd",
    "aten::multi_margin_loss",
    "aten::multilabel_margin_loss",
)
def class_loss(call: Call) -> Dims:
    """The target numbers the classes."""
    return call.whole("classes are numbered")


@rule("aten::cosine_embedding_loss", "aten::triplet_margin_loss")
def vector_loss(call: Call) -> Dims:
    return call.whole("vectors are compared in a loss")
