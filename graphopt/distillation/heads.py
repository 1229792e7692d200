"""Heads: the layer behind an output, made anew for labels of other classes.

linear(x, weight (1000, 512), bias (1000))     ->     linear(x, weight (10, 512), bias (10))
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from graphopt.distillation.taps import output_values
from graphopt.errors import UsageError
from graphopt.ir.editor import Editor
from graphopt.ir.graph import arguments, constant, readers
from graphopt.ir.operators import COPIES, DROPOUTS, LOG_SOFTMAXES, SOFTMAXES, Family
from graphopt.ir.program import Program
from graphopt.ir.signature import TensorSpec

_HEADS = Family("linear")
_BEHIND = COPIES | DROPOUTS | SOFTMAXES | LOG_SOFTMAXES  # what may stand between a head and its output


def with_head(program: Program, classes: int, output: str, generator: torch.Generator) -> Program:
    """Return a program whose output has so many classes: its last layer is drawn anew, as torch draws a Linear.

    Args:
        program: it is not changed.
        classes: how many there are to be.
        output: which output; "": the first.
        generator: draws the weights.

    Raises:
        UsageError: there is no such output, or no Linear of its own behind it.
    """
    names = [spec.name for spec in program.outputs]
    if output and output not in names:
        raise UsageError(f"The student has no output `{output}` to give a new head. It has {', '.join(names)}.")
    index = names.index(output) if output else 0
    result = program.copy()
    gm = result.graph_module
    head = _head(output_values(result)[index])
    tensors = {} if head is None else {part: arguments(head, ())[part] for part in ("weight", "bias")}
    shared = [
        node for node in tensors.values() if isinstance(node, fx.Node) and len(readers(gm.graph, str(node.target))) > 1
    ]
    if head is None or shared or constant(tensors["weight"], gm) is None:
        why = f"its weight `{shared[0].target}` is used elsewhere too" if shared else "no Linear is behind it"
        raise UsageError(f"The output `{names[index]}` cannot have a new head: {why}. Change the model itself.")
    editor = Editor(gm, "distill")
    for node in tensors.values():
        old = constant(node, gm)
        if old is not None:
            bound = constant(tensors["weight"], gm).shape[1] ** -0.5  # type: ignore[union-attr]
            drawn = (torch.rand((classes, *old.shape[1:]), generator=generator) * 2 - 1) * bound
            editor.put(str(node.target), drawn.to(old.dtype), trainable=True)
    editor.propagate_from([head])
    outputs = zip(program.outputs, output_values(result), strict=True)  # others may be computed of the same head
    return result.with_graph(editor.finish(), outputs=[_resized(spec, value) for spec, value in outputs])


def _resized(spec: TensorSpec, value: fx.Node) -> TensorSpec:
    sizes = zip(spec.shape, value.meta["val"].shape, strict=True)
    fixed = (now if isinstance(size, int) and isinstance(now, int) else size for size, now in sizes)
    return replace(spec, shape=tuple(fixed))


def _head(node: fx.Node) -> fx.Node | None:
    while node in _BEHIND and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node if node in _HEADS else None
