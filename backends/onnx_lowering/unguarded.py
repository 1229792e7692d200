"""Guards against what torch's kernels trust are taken out again (`capturing/guards`): runtimes check by themselves.

lstm(expand(x, -1, n, 4), ..)                               lstm(x, ..)
embedding_bag(w, i, select_scatter(o, o[0], 0, 0), ..)      embedding_bag(w, i, o, ..)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.ir.regions import graph_modules

aten = torch.ops.aten
_GUARDED = (aten.lstm.input, aten.embedding_bag.default, aten.embedding_bag.padding_idx)


def take_out_guards(gm: fx.GraphModule) -> None:
    """Let guarded calls read what the guards read, in place."""
    for body in graph_modules(gm):
        for node in body.graph.nodes:
            if node.target in _GUARDED:
                node.args = fx.map_arg(node.args, _unguarded)
        body.graph.eliminate_dead_code()
        body.recompile()


def _unguarded(value: fx.Node) -> fx.Node:
    source: Any = value.args[0] if value.target in (aten.expand.default, aten.select_scatter.default) else None
    if not isinstance(source, fx.Node):
        return value
    if value.target is aten.select_scatter.default:
        first: Any = value.args[1]
        same = isinstance(first, fx.Node) and first.target is aten.select.int
        return source if same and first.args == (source, *value.args[2:]) else value
    return source if source.meta["val"].shape == value.meta["val"].shape else value
