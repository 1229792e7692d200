"""Spells operators the way a target's integer kernels want them, before anything is placed.

silu(x)            -> mul(x, sigmoid(x))                    where the target has kernels for the two
mean(x, spatial)   -> [flatten](adaptive_avg_pool(x, 1))    where it has one for global pooling
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from graphopt.ir.editor import Editor
from graphopt.ir.graph import arguments
from graphopt.ir.operators import short_name
from graphopt.passes.quantization.kernels import rank, spatial_mean
from graphopt.targets.description import TargetDescription

aten = torch.ops.aten
_GLOBAL_POOL = {
    3: aten.adaptive_avg_pool1d.default,
    4: aten.adaptive_avg_pool2d.default,
    5: aten.adaptive_avg_pool3d.default,
}


def spellings(graph: fx.Graph, target: TargetDescription) -> dict[str, str]:
    """Return how each node is to be spelled, by name."""
    known = {rule.operator for rule in target.operators}
    found = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        name = short_name(node)
        if name == "silu" and {"sigmoid", "mul"} <= known and "silu" not in known:
            found[node.name] = "mul_sigmoid"
        elif name == "mean" and "global_average_pool" in known and spatial_mean(node):
            found[node.name] = "global_average_pool"
    return found


def respell(editor: Editor, wanted: Mapping[str, str]) -> dict[str, str]:
    """Respell nodes in place. Returns the old name of each new node that computes what an old one did."""
    renamed = {}
    for node in list(editor.graph.nodes):
        spelling = wanted.get(node.name)
        if spelling is None:
            continue
        made = _mul_sigmoid(editor, node) if spelling == "mul_sigmoid" else _global_pool(editor, node)
        renamed.update({new.name: node.name for new in made})
        editor.replace(node, made[-1])
    return renamed


def _mul_sigmoid(editor: Editor, node: fx.Node) -> Sequence[fx.Node]:
    x = node.args[0]
    with editor.graph.inserting_before(node):
        gate = editor.call(aten.sigmoid.default, x, like=node)
        return [editor.call(aten.mul.Tensor, x, gate, like=node)]


def _global_pool(editor: Editor, node: fx.Node) -> Sequence[fx.Node]:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    with editor.graph.inserting_before(node):
        pool = editor.call(_GLOBAL_POOL[rank(x)], x, [1] * (rank(x) - 2), like=node)
        if arguments(node, ())["keepdim"]:
            return [pool]
        return [pool, editor.call(aten.flatten.using_ints, pool, 1, like=node)]
