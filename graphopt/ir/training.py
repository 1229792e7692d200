"""Putting a captured graph in training mode and back: whether calls draw at random and normalise by the batch.

Capture in eval mode bakes `training=False` into such operators; only that flag changes here. A call that capture
saw in training mode is random, or normalises by its batch, on purpose, and stays so. What the model did in Python
under `if self.training` is gone from the graph and is reported at capture.

Which operators behave otherwise in training is read from their schemas: they have a flag.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import fx

from graphopt.ir.graph import arguments
from graphopt.ir.provenance import custom_notes
from graphopt.ir.torch_internals import OpOverload

_FLAGS = ("train", "training", "use_input_stats")  # what their schemas call it

_SWITCHED = "graphopt_training"  # in meta["custom"]: this module switched the call to training


def set_training(gm: fx.GraphModule, mode: bool) -> None:
    """Set the training flag of every call that eval capture switched off, in place."""
    changed = False
    for node in gm.graph.nodes:
        flag = training_flag(node)
        if flag is None or arguments(node, (flag,))[flag] is mode:
            continue
        custom = custom_notes(node)
        if not mode and custom.pop(_SWITCHED, None) is None:
            continue
        node.meta["custom"] = {**custom, _SWITCHED: "on"} if mode else custom
        set_argument(node, flag, mode)
        changed = True
    gm.training = mode
    if changed:
        gm.recompile()


def is_training(gm: fx.GraphModule) -> bool:
    """Whether `set_training` has switched a call on."""
    return any(_SWITCHED in custom_notes(node) for node in gm.graph.nodes)


def training_flag(node: fx.Node) -> str | None:
    """Return the name of the argument that switches a call to training, None where it has none."""
    return argument_called(node.target, _FLAGS) if node.op == "call_function" else None


@functools.cache
def argument_called(target: Any, names: tuple[str, ...]) -> str | None:
    """Return the first argument in an ATen operator's schema that is called one of `names`.

    None where it takes none of them, and for what is no operator of ATen.
    """
    if not isinstance(target, OpOverload) or target.namespace != "aten":
        return None
    return next((argument.name for argument in target._schema.arguments if argument.name in names), None)


def set_argument(node: fx.Node, name: str, value: object) -> None:
    """Change an argument by its schema name, in place."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    if names.index(name) < len(node.args):
        node.update_arg(names.index(name), value)  # type: ignore[arg-type]
    else:
        node.update_kwarg(name, value)  # type: ignore[arg-type]
