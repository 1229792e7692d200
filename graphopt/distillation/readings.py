"""Programs as training reads them: values inside as further outputs, and of a teacher nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from graphopt.distillation.adapters import Change, Classifier, insert_adapter
from graphopt.distillation.addresses import Tap
from graphopt.distillation.attention_taps import read_attention
from graphopt.distillation.taps import output_values, own_outputs, taps_of, with_taps
from graphopt.ir.editor import Editor
from graphopt.ir.graph import assemble, copy_graph_module, erase_dead, restructure
from graphopt.ir.program import Program
from graphopt.ir.torch_internals import pytree

_ATEN = torch.ops.aten
_MADE_BY = "distill"


@dataclass(frozen=True)
class Reading:
    """A value that a loss reads: of a fused attention call what is inside it, where the loss is of that."""

    tap: Tap
    loss: str


def opened(program: Program, readings: Sequence[Reading]) -> Program:
    """Return a program with one tap for each reading, in their order, after its own outputs.

    Raises:
        UsageError: a call is of a form that cannot be opened.
    """

    def inside(editor: Editor, node: fx.Node, number: int) -> fx.Node:
        return read_attention(editor, node, readings[number].loss, readings[number].tap.address)

    taps = [Tap(f"{number}:{reading.tap.address}", reading.tap.node) for number, reading in enumerate(readings)]
    return _tapped(program, taps, inside)


def tapped_nodes(program: Program) -> list[fx.Node]:
    """List what the taps of a program read, in their order."""
    nodes = {node.name: node for node in program.graph.nodes}
    return [nodes[tap.node] for tap in taps_of(program)]


def adapted(program: Program, changes: Sequence[Change | Classifier], generator: torch.Generator) -> Program:
    """Return an opened program whose taps are behind adapters, one change for each tap."""

    def behind(editor: Editor, node: fx.Node, number: int) -> fx.Node:
        return insert_adapter(editor, node, changes[number], number, generator)

    return _tapped(program, taps_of(program), behind)


def gathered(program: Program, channels: Sequence[tuple[int, Sequence[int]]]) -> Program:
    """Return an opened program whose taps give some of their channels: for each tap the axis, and which; none: all."""

    def chosen(editor: Editor, node: fx.Node, number: int) -> fx.Node:
        axis, wanted = channels[number]
        if not wanted:
            return node
        index = editor.read(editor.put(f"distill_channels.{number}", torch.tensor(list(wanted))), like=node)
        return editor.call(_ATEN.index_select.default, node, axis, index, like=node)

    return _tapped(program, taps_of(program), chosen)


def truncated(program: Program, outputs: Sequence[int]) -> Program:
    """Return a program that gives some of its own outputs and all of its taps, as a tuple, and computes no more."""
    gm = copy_graph_module(program.graph_module)
    nodes = {node.name: node for node in gm.graph.nodes}
    own, values = own_outputs(program), output_values(program)
    read = [*(values[index].name for index in outputs), *(tap.node for tap in taps_of(program))]
    gm.graph.output_node().args = (tuple(nodes[name] for name in read),)
    gm.graph.output_node().meta.pop("val", None)
    erase_dead(gm.graph)
    result = restructure(gm, pytree.tree_structure(tuple(range(len(read)))))
    specs = [*(own[index] for index in outputs), *program.outputs[len(own) :]]
    return program.with_graph(result, outputs=specs)


def _tapped(program: Program, taps: Sequence[Tap], read: Callable[[Editor, fx.Node, int], fx.Node]) -> Program:
    """Return a program whose taps are what `read` makes of the values that they are of, by their number."""
    gm = copy_graph_module(program.graph_module)
    editor = Editor(gm, _MADE_BY)
    nodes = {node.name: node for node in gm.graph.nodes}
    with gm.graph.inserting_before(gm.graph.output_node()):
        found = [read(editor, nodes[tap.node], number).name for number, tap in enumerate(taps)]
    renewed = [Tap(tap.address, name) for tap, name in zip(taps, found, strict=True)]
    return with_taps(program.with_graph(assemble(gm, gm.graph)), renewed)
