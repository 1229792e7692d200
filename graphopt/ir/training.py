"""Putting a captured graph in training mode and back: whether calls draw at random and normalise by the batch.

Capture in eval mode bakes `training=False` into such operators; only that flag changes here. A call that capture
saw in training mode is random, or normalises by its batch, on purpose, and stays so. What the model did in Python
under `if self.training` is gone from the graph. What can be seen of that is reported at capture (`capturing/lost.py`):
rates that modules state, a `train()` of their own, and what stays in evaluation mode.

Which operators behave otherwise in training is read from their schemas: they have a flag.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Iterator
from typing import Any

from torch import fx

from graphopt.ir.graph import arguments
from graphopt.ir.provenance import custom_notes
from graphopt.ir.regions import regions
from graphopt.ir.torch_internals import OpOverload

_FLAGS = ("train", "training", "use_input_stats")  # what their schemas call it

_SWITCHED = "graphopt_training"  # in meta["custom"]: this module switched the call to training


def set_training(gm: fx.GraphModule, mode: bool, spared: Container[fx.Node] = ()) -> None:
    """Set the training flag of every call that eval capture switched off, but for those of `spared`, in place."""
    for body in _trained(gm):
        changed = False
        for node, flag in _flagged(body):
            if arguments(node, (flag,))[flag] is mode or node in spared:
                continue
            custom = custom_notes(node)
            if not mode and custom.pop(_SWITCHED, None) is None:
                continue
            node.meta["custom"] = {**custom, _SWITCHED: "on"} if mode else custom
            set_argument(node, flag, mode)
            changed = True
        body.training = mode
        if changed:
            body.recompile()


def is_training(gm: fx.GraphModule) -> bool:
    """Whether `set_training` has switched a call on."""
    return any(_SWITCHED in custom_notes(node) for node in switchable(gm))


def switchable(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """Yield the calls that training switches."""
    return (node for body in _trained(gm) for node, _ in _flagged(body))


def _trained(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """Yield a graph module and the bodies of its blocks, at any depth.

    Those of branches and loops stay as they were captured: where gradients are followed torch runs them twice, with
    other random numbers, and statistics move as often (2.13).
    """
    yield gm
    for found in regions(gm):
        if found.form == "block":
            yield from _trained(found.main)


def _flagged(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, str]]:
    return ((node, flag) for node in gm.graph.nodes if (flag := training_flag(node)) is not None)


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
