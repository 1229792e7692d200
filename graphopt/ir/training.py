"""Putting a captured graph in training mode and back: BatchNorm statistics and Dropout masks.

Capture in eval mode bakes `training=False` into those operators; only that flag changes here. A call that capture
saw in training mode is random, or normalises by its batch, on purpose, and stays so. What the model did in Python
under `if self.training` is gone from the graph and is reported at capture.
"""

from __future__ import annotations

import torch
from torch import fx

from graphopt.ir.operators import DROPOUTS, Family
from graphopt.ir.provenance import custom_notes

_SWITCHABLE = DROPOUTS | Family("batch_norm", "rrelu")
_FLAGS = ("train", "training")  # what their schemas call it

_SWITCHED = "graphopt_training"  # in meta["custom"]: this module switched the call to training


def set_training(gm: fx.GraphModule, mode: bool) -> None:
    """Set the training flag of every BatchNorm and Dropout call that eval capture switched off, in place."""
    changed = False
    for node in gm.graph.nodes:
        position = training_flag(node)
        if position is None or node.args[position] is mode:
            continue
        custom = custom_notes(node)
        if not mode and custom.pop(_SWITCHED, None) is None:
            continue
        node.meta["custom"] = {**custom, _SWITCHED: "on"} if mode else custom
        node.update_arg(position, mode)
        changed = True
    gm.training = mode
    if changed:
        gm.recompile()


def is_training(gm: fx.GraphModule) -> bool:
    """Whether `set_training` has switched a call on."""
    return any(_SWITCHED in custom_notes(node) for node in gm.graph.nodes)


def leave_training(gm: fx.GraphModule) -> list[str]:
    """Put what a stranger exported, maybe in training mode, in evaluation mode, in place; name the operators switched.

    Nothing tells in it what training mode had switched on from what is always on. A normalisation by the batch stays
    where there are no statistics to take its place.
    """
    switched: dict[str, None] = {}
    for guards in gm.graph.find_nodes(op="call_module", target="_guards_fn"):  # they fix sizes, such as the batch
        gm.graph.erase_node(guards)
    for body in [module for module in gm.modules() if isinstance(module, fx.GraphModule)]:
        for node in list(body.graph.nodes):
            position = training_flag(node)
            if position is not None and node.args[position] is True and not _lacks_statistics(node):
                node.update_arg(position, False)
                switched[str(node.target).split(".")[1].removesuffix("_")] = None
            elif _counts_batches(node):
                body.graph.erase_node(node)
        body.recompile()
    return list(switched)


def _lacks_statistics(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.batch_norm.default and node.args[3] is None


def _counts_batches(node: fx.Node) -> bool:
    """Whether a call does what BatchNorm does to its counter in training."""
    counter = node.args[0] if node.target is torch.ops.aten.add_.Tensor and not node.users else None
    return (
        isinstance(counter, fx.Node)
        and counter.op == "get_attr"
        and str(counter.target).rpartition(".")[2] == "num_batches_tracked"
    )


def training_flag(node: fx.Node) -> int | None:
    """Return the position of the argument that switches a call to training, None where it has none."""
    if node not in _SWITCHABLE:
        return None
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return next(position for position, name in enumerate(names) if name in _FLAGS)
