"""Putting a captured graph in training mode and back: BatchNorm statistics and Dropout masks.

Capture in eval mode bakes `training=False` into those operators; only that flag changes here. A call that capture
saw in training mode is random, or normalises by its batch, on purpose, and stays so. What the model did in Python
under `if self.training` is gone from the graph and is reported at capture.
"""

from __future__ import annotations

import torch
from torch import fx

# operator -> position of its training flag
TRAINING_FLAG = {
    torch.ops.aten.batch_norm.default: 5,
    torch.ops.aten.dropout.default: 2,
    torch.ops.aten.dropout_.default: 2,
    torch.ops.aten.alpha_dropout.default: 2,
    torch.ops.aten.feature_dropout.default: 2,
    torch.ops.aten.feature_alpha_dropout.default: 2,
    torch.ops.aten.rrelu.default: 3,
}

_SWITCHED = "graphopt_training"  # in meta["custom"]: this module switched the call to training


def set_training(gm: fx.GraphModule, mode: bool) -> None:
    """Set the training flag of every BatchNorm and Dropout call that eval capture switched off, in place."""
    changed = False
    for node in gm.graph.nodes:
        position = TRAINING_FLAG.get(node.target)
        if position is None or node.args[position] is mode:
            continue
        custom = dict(node.meta.get("custom", {}))
        if not mode and custom.pop(_SWITCHED, None) is None:
            continue
        node.meta["custom"] = {**custom, _SWITCHED: "on"} if mode else custom
        node.update_arg(position, mode)
        changed = True
    gm.training = mode
    if changed:
        gm.recompile()


def training_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """List the calls that behave differently in training."""
    return [n for n in gm.graph.nodes if n.target in TRAINING_FLAG]
