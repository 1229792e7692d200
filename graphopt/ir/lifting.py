"""Writing a graph as an exported program without tracing it again.

    %w = get_attr[weight]; %y = call(%x, %w)        p_weight, x; %y = call(p_weight, x), weight in the state

A trace of ResNet-50 takes two seconds and finds what the graph records already: each call, with the value it gives.
What it would do besides is left to it: regions, calls that write, check or depend on data, tied tensors, results that
are no tensors of calls. So is a program out of a file, whose record is not believed. Ranges of dynamic axes are those
that capture found: what passes propagate would narrow them (a convolution asks whether a batch is below 16, torch
2.13).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)

from graphopt.ir.aliasing import written_inputs
from graphopt.ir.graph import fake_mode_of
from graphopt.ir.names import Names
from graphopt.ir.signature import TensorSpec
from graphopt.ir.torch_internals import (
    FakeTensor,
    OpOverload,
    TrainingIRVerifier,
    calling_convention,
    forget_guards,
    free_symbols,
    pytree,
)

_RANGES = "graphopt.ranges"  # in a graph module's metadata: by symbol of the inputs what it may be
_PYTHON = (operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod)
_UNSPEAKABLE = re.compile(r"[^a-zA-Z0-9_]")  # in Python's own names: modules may be called anything (`block-0`)
_PREFIX = {InputKind.PARAMETER: "p_", InputKind.BUFFER: "b_"}


def record_ranges(gm: fx.GraphModule) -> None:
    """Note what the dynamic axes of a fresh trace may be: it can be lifted from now on, unless they depend on more."""
    values = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    symbols = {symbol for value in values if isinstance(value, torch.Tensor) for symbol in free_symbols(value)}
    env = fake_mode_of(gm).shape_env
    if env and env.guards:
        return
    gm.meta[_RANGES] = {symbol: env.var_to_range[symbol] for symbol in sorted(symbols, key=str)} if env else {}


def lifted(
    gm: fx.GraphModule, inputs: tuple[TensorSpec, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> ExportedProgram | None:
    """Return a graph as an exported program, which takes it over; None where only a trace can tell.

    Args:
        gm: whose tensors the exported program shares.
        inputs: its tensor inputs.
        args: positional examples.
        kwargs: keyword examples.
    """
    held, called = _held(gm), calling_convention(gm.graph)
    if held is None or called is None or not (_takes(gm, inputs) and _computes(gm)):
        return None
    graph = gm.graph
    given = graph.find_nodes(op="placeholder")
    taken = {node.name for node in graph.nodes}
    for node in given:
        if str(node.target) not in taken:  # a graph calls `input` `input_1`, and a file knows inputs by these names
            node.name = str(node.target)
    names, structure, returned = called
    specs = _lift(graph, held)
    specs += [InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None) for node in given]
    output = graph.output_node()
    results: Any = tuple(output.args[0])  # type: ignore[arg-type]
    output.args = (results,)
    found = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results]
    program = ExportedProgram(
        root=nn.Module(),
        graph=graph,
        graph_signature=ExportGraphSignature(specs, found),
        state_dict={name: tensor for name, (_, tensor) in held.items()},
        range_constraints=dict(gm.meta[_RANGES]),
        module_call_graph=[ModuleCallEntry("", ModuleCallSignature([], [], structure, returned, names))],
        example_inputs=(args, dict(kwargs)),
        verifiers=[TrainingIRVerifier],
    )
    forget_guards(program)  # what capture found is in the ranges; the others passes came by
    return program


def _held(gm: fx.GraphModule) -> dict[str, tuple[InputKind, torch.Tensor]] | None:
    """Return the parameters and buffers that a graph reads, by name; None where it reads others, or one twice."""
    read = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    stored = gm.state_dict(keep_vars=True)  # without what is not to be saved
    parameters = {name for name, _ in gm.named_parameters(remove_duplicate=False)}
    found = {
        name: (InputKind.PARAMETER if name in parameters else InputKind.BUFFER, tensor)
        for name, tensor in stored.items()
        if name in read and type(tensor) in (torch.Tensor, nn.Parameter)
    }
    once = len({id(tensor) for _, tensor in found.values()}) == len(found)
    return (
        dict(sorted(found.items(), key=lambda item: item[1][0].name == "BUFFER")) if once and read == {*found} else None
    )


def _takes(gm: fx.GraphModule, inputs: tuple[TensorSpec, ...]) -> bool:
    """Whether a graph takes tensors alone, with the dynamic axes that it should have."""
    values = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    if _RANGES not in gm.meta or len(values) != len(inputs):
        return False
    return all(
        type(value) is FakeTensor
        and all(
            isinstance(want, int) == isinstance(size, int) for want, size in zip(spec.shape, value.shape, strict=True)
        )
        for spec, value in zip(inputs, values, strict=True)
    )


def _computes(gm: fx.GraphModule) -> bool:
    """Whether all that a graph does is to give values, out of the sizes of its inputs, and returns some of them."""
    known = gm.meta[_RANGES].keys()
    calls = [node for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    results: Any = gm.graph.output_node().args[0]
    tensors = [node for node in calls if isinstance(node.meta.get("val"), torch.Tensor)]
    return (
        len(set(results)) == len(results)
        and set(results) <= set(tensors)
        and all(_gives_values(node, known) for node in calls)
    )


def _gives_values(node: fx.Node, symbols: Set[object]) -> bool:
    if node.op != "call_function" or not (isinstance(node.target, OpOverload) or node.target in _PYTHON):
        return False
    values = pytree.tree_leaves(node.meta.get("val"))
    return not written_inputs(node) and all(
        isinstance(value, torch.Tensor | torch.SymInt) and free_symbols(value) <= symbols for value in values
    )


def _lift(graph: fx.Graph, held: Mapping[str, tuple[InputKind, torch.Tensor]]) -> list[InputSpec]:
    """Replace reads of tensors by inputs in front of all others; return what they are."""
    reads = graph.find_nodes(op="get_attr")
    names = Names(node.name for node in graph.nodes)
    inputs: dict[str, fx.Node] = {}
    with graph.inserting_before(next(iter(graph.nodes))):
        for name, (kind, _) in held.items():
            inputs[name] = graph.placeholder(names.new(_PREFIX[kind] + _UNSPEAKABLE.sub("_", name)))
    for node in reads:
        lifted = inputs[str(node.target)]
        lifted.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(lifted)
        graph.erase_node(node)
    return [
        InputSpec(kind, TensorArgument(inputs[name].name), name, True if kind is InputKind.BUFFER else None)
        for name, (kind, _) in held.items()
    ]
