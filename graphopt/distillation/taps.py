"""Taps: values inside a program as extra outputs, inserted and stripped without trace.

    return out                      ->   return (out, {"layer1.0:relu#1": relu_2})
    outputs: [output]               ->   outputs: [output, tap_layer1_0_relu_1]

The program's own outputs stay first and keep their structure; the taps follow in a dictionary by address, in
graph order of insertion. No node is added, so stripping gives back the very graph. The name of a tap among
`Program.outputs`, and so in ONNX, is its address with everything but letters and digits made `_`, after `tap_`.
Capture calls the second part of a tuple `output_1_...`, so no captured output is ever taken for a tap.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphopt.distillation.addresses import Tap
from graphopt.errors import PassError
from graphopt.ir.graph import copy_graph_module, erase_dead, restructure
from graphopt.ir.names import Names
from graphopt.ir.program import Program
from graphopt.ir.signature import Dimension, TensorSpec
from graphopt.ir.size_expressions import printed
from graphopt.ir.torch_internals import output_structure, pytree

_PREFIX = "tap_"


def taps_of(program: Program) -> list[Tap]:
    """List the taps of a program, in the order of its outputs; empty if it has none."""
    addresses = _tap_addresses(program)
    leaves = _output_node(program.graph).args[0]
    assert isinstance(leaves, tuple | list)
    tapped = [leaf for leaf in leaves[len(leaves) - len(addresses) :] if isinstance(leaf, fx.Node)]
    return [Tap(address, node.name) for address, node in zip(addresses, tapped, strict=True)]


def insert_taps(program: Program, taps: Sequence[Tap]) -> Program:
    """Return `program` with the values of `taps` as further outputs; those it has already stay.

    Raises:
        PassError: the program has no such node, as when a plan is applied to another program.
    """
    present = taps_of(program)
    known = {tap.address for tap in present}
    every = [*present, *(tap for tap in taps if tap.address not in known)]
    return with_taps(program, every) if len(every) > len(present) else program


def strip_taps(program: Program, taps: Sequence[str] | None = None) -> Program:
    """Return `program` without the taps at these addresses (all of them by default): what `insert_taps` was given.

    What only a stripped tap kept alive is dropped with it.
    """
    present = taps_of(program)
    kept = [tap for tap in present if taps is not None and tap.address not in taps]
    return with_taps(program, kept) if len(kept) < len(present) else program


def own_outputs(program: Program) -> tuple[TensorSpec, ...]:
    """Return the outputs of `program` without its taps."""
    return program.outputs[: len(program.outputs) - len(_tap_addresses(program))]


def output_values(program: Program) -> list[fx.Node]:
    """List the nodes behind `own_outputs`."""
    leaves = _output_node(program.graph).args[0]
    assert isinstance(leaves, tuple | list)
    nodes = [leaf for leaf in leaves if isinstance(leaf, fx.Node) and isinstance(leaf.meta.get("val"), torch.Tensor)]
    return nodes[: len(own_outputs(program))]


def with_taps(program: Program, taps: Sequence[Tap]) -> Program:
    """Return a copy of `program` whose taps are exactly `taps`; what only others kept alive is dropped."""
    gm = copy_graph_module(program.graph_module)
    structure = output_structure(gm)
    had = len(_tap_addresses(program))
    own = structure.children()[0] if had else structure
    output = _output_node(gm.graph)
    leaves = list(output.args[0])  # type: ignore[arg-type]
    tapped = _nodes(gm.graph, taps)
    output.args = ((*leaves[: len(leaves) - had], *tapped),)
    if "val" in output.meta:  # recorded by a load from `.pt2`, not by capture
        output.meta["val"] = fx.map_arg(output.args[0], lambda node: node.meta["val"])
    erase_dead(gm.graph)
    result = restructure(gm, _wrapped(own, [tap.address for tap in taps]) if taps else own)
    specs = own_outputs(program)
    return program.with_graph(result, outputs=(*specs, *_specs(program, taps, tapped)))


def _nodes(graph: fx.Graph, taps: Sequence[Tap]) -> list[fx.Node]:
    by_name = {node.name: node for node in graph.nodes}
    missing = [tap for tap in taps if tap.node not in by_name]
    if missing:
        raise PassError(
            f"The program has no node `{missing[0].node}` for the tap `{missing[0].address}`. The plan was made for "
            "another program: plan again."
        )
    return [by_name[tap.node] for tap in taps]


def _wrapped(own: pytree.TreeSpec, addresses: Sequence[str]) -> pytree.TreeSpec:
    inner = pytree.tree_unflatten(range(own.num_leaves), own)
    return pytree.tree_structure((inner, dict.fromkeys(addresses, 0)))


def _specs(program: Program, taps: Sequence[Tap], nodes: Sequence[fx.Node]) -> list[TensorSpec]:
    names = Names(spec.name for spec in (*program.inputs, *own_outputs(program)))
    axes = _axis_names(program)
    specs = []
    for tap, node in zip(taps, nodes, strict=True):
        value = node.meta["val"]
        shape = tuple(_dimension(size, axes) for size in value.shape)
        name = names.new(_PREFIX + re.sub(r"\W+", "_", tap.address).strip("_"))
        specs.append(TensorSpec(name, shape, value.dtype))
    return specs


def _axis_names(program: Program) -> dict[Any, str]:
    """Return the name of every symbol that is the size of an input axis."""
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    tensors = [node for node in inputs if isinstance(node.meta.get("val"), torch.Tensor)]
    names: dict[Any, str] = {}
    for spec, node in zip(program.inputs, tensors, strict=True):
        for size, name in zip(node.meta["val"].shape, spec.shape, strict=True):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol and str(name).isidentifier():
                names.setdefault(size.node.expr, str(name))
    return names


def _dimension(size: int | torch.SymInt, names: dict[Any, str]) -> Dimension:
    if not isinstance(size, torch.SymInt):
        return size
    expression = size.node.expr
    if expression.is_number:
        return int(expression)
    named = expression.xreplace({symbol: type(symbol)(name) for symbol, name in names.items()})
    return printed(named) or str(named)


def _tap_addresses(program: Program) -> list[str]:
    """Return the addresses of the taps that the output structure holds."""
    structure = output_structure(program.graph_module)
    parts = structure.children() if structure.type is tuple else []
    if len(parts) != 2 or parts[1].type is not dict or not parts[1].num_leaves:
        return []
    addresses = list(parts[1].context)
    named = program.outputs[len(program.outputs) - len(addresses) :]
    return addresses if all(spec.name.startswith(_PREFIX) for spec in named) else []


def _output_node(graph: fx.Graph) -> fx.Node:
    return graph.output_node()
