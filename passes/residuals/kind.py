"""What the calls of a branch amount to, and what to call them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import fx

from graphopt.ir.operators import ALL_CONVOLUTIONS, ATTENTION, PRODUCTS, RECURRENT, SOFTMAXES
from graphopt.ir.provenance import module_path
from graphopt.passes.layers.recognition import Layers

BranchKind = Literal["attention", "convolution", "recurrent", "mlp", "mixer"]


def describe(nodes: Sequence[fx.Node], known: Layers) -> tuple[BranchKind, str]:
    """Return the kind of a branch and the path of the module that all its layers belong to."""
    layers = [node for node in nodes if node in known]
    everything = [*nodes, *known.inside(nodes)]
    kind = _kind(everything, [node for node in everything if node in known])
    return kind, _common([module_path(node) for node in layers])


def _kind(nodes: Sequence[fx.Node], layers: Sequence[fx.Node]) -> BranchKind:
    mixing = [node for node in nodes if node in PRODUCTS and node not in layers]  # values with values
    by_hand = len(mixing) >= 2 and any(node in SOFTMAXES for node in nodes)
    if by_hand or any(node in ATTENTION for node in nodes):
        return "attention"
    if any(node in RECURRENT for node in nodes):
        return "recurrent"
    if any(node in ALL_CONVOLUTIONS for node in layers):
        return "convolution"
    return "mixer" if mixing else "mlp"


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
