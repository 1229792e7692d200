"""What the calls of a branch amount to, and what to call them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import fx

from graphopt.ir.provenance import module_path, op_name
from graphopt.passes.layers.recognition import RECURRENT, Layers

BranchKind = Literal["attention", "convolution", "recurrent", "mlp", "mixer"]

_MIXING = ("matmul", "bmm", "baddbmm", "einsum")


def describe(nodes: Sequence[fx.Node], known: Layers) -> tuple[BranchKind, str]:
    """Return the kind of a branch and the path of the module that all its layers belong to."""
    layers = [node for node in nodes if node in known]
    everything = [*nodes, *known.inside(nodes)]
    kind = _kind(everything, [node for node in everything if node in known])
    return kind, _common([module_path(node) for node in layers])


def _kind(nodes: Sequence[fx.Node], layers: Sequence[fx.Node]) -> BranchKind:
    names = {op_name(node) for node in nodes}
    products = [node for node in nodes if op_name(node) in _MIXING and node not in layers]
    if "scaled_dot_product_attention" in names or ({"softmax", "_softmax"} & names and len(products) >= 2):
        return "attention"
    if any(name in RECURRENT for name in names):
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
