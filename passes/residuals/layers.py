"""What the calls of a branch amount to: whether they are layers, and what to call them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import fx

from graphopt.graph import constant
from graphopt.passes.weighted_calls import is_layer, weighted_call
from graphopt.provenance import module_path, op_name

Kind = Literal["attention", "convolution", "recurrent", "mlp", "mixer"]

_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_PRODUCTS = ("mm", "matmul", "bmm", "baddbmm", "addbmm", "einsum", "bilinear", *_RECURRENT)
_MIXING = ("matmul", "bmm", "baddbmm", "einsum")


def has_weights(node: fx.Node, gm: fx.GraphModule) -> bool:
    """Whether `node` is a convolution, a product with stored weights, or recurrent.

    Sums without any are no blocks: `x - mean(x)`, activations with a learned slope.
    """
    if is_layer(node) or weighted_call(node, gm) is not None:
        return True
    return op_name(node) in _PRODUCTS and any(constant(used, gm) is not None for used in node.all_input_nodes)


def describe(nodes: Sequence[fx.Node], gm: fx.GraphModule) -> tuple[Kind, str]:
    """Return the kind of a branch and the path of the module that all its layers belong to."""
    layers = [node for node in nodes if has_weights(node, gm)]
    return _kind(nodes, layers), _common([module_path(node) for node in layers])


def _kind(nodes: Sequence[fx.Node], layers: Sequence[fx.Node]) -> Kind:
    names = {op_name(node) for node in nodes}
    products = [node for node in nodes if op_name(node) in _MIXING and node not in layers]
    if "scaled_dot_product_attention" in names or ({"softmax", "_softmax"} & names and len(products) >= 2):
        return "attention"
    if any(name in _RECURRENT for name in names):
        return "recurrent"
    if any("conv" in op_name(node) for node in layers):
        return "convolution"
    return "mixer" if products else "mlp"


def _common(paths: Sequence[str]) -> str:
    """Return the longest path that all paths start with."""
    parts = [path.split(".") for path in paths if path]
    if not parts:
        return ""
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)
