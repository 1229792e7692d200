"""Reading, copying and assembling graph modules; an `Editor` changes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.ir.aliasing import written_inputs
from graphopt.ir.names import Names
from graphopt.ir.torch_internals import (
    FakeTensorMode,
    ShapeEnv,
    copy_code_generator,
    copy_structures,
    detect_fake_mode,
    pytree,
    set_output_structure,
)


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of `gm` with its own graph, bodies of regions and module tree that shares every tensor.

    Metadata dictionaries are copied one level deep; `meta["val"]` and the tensors are shared and must not be
    written to.
    """
    graph = fx.Graph()
    memo: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, memo)
    source = next(node for node in gm.graph.nodes if node.op == "output")
    graph.output(result).meta.update(source.meta)
    copy_code_generator(gm, graph)
    for old, new in memo.items():
        new.meta = dict(old.meta)
    copied = assemble(gm, graph)
    bodies: dict[fx.GraphModule, fx.GraphModule] = {}
    for name in dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "get_attr"):
        held = _attribute(copied, name)
        if isinstance(held, fx.GraphModule):  # the body of a region
            if held not in bodies:
                bodies[held] = copy_graph_module(held)
            path, _, leaf = name.rpartition(".")
            setattr(copied.get_submodule(path), leaf, bodies[held])
    return copied


def name_inputs_apart(gm: fx.GraphModule) -> None:
    """Give no placeholder the name of another argument, in place.

    Code that torch generates sets one after the other, `input_1 = input; input_2 = input_1`, and the second then reads
    what was the first (2.13).
    """
    given = gm.graph.find_nodes(op="placeholder")
    arguments = {str(node.target) for node in given}
    clashing = [node for node in given if node.name != node.target and node.name in arguments]
    names = Names(arguments | {node.name for node in gm.graph.nodes})
    for node in clashing:
        with gm.graph.inserting_before(node):
            renamed = gm.graph.create_node("placeholder", node.target, node.args, name=names.new(node.name))
        renamed.meta, renamed.type = node.meta, node.type
        node.replace_all_uses_with(renamed)
        gm.graph.erase_node(node)
    if clashing:
        gm.recompile()


def assemble(gm: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """Build a GraphModule of `graph` with the attributes of `gm` that it reads or calls, shared."""
    named = [str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")]
    attributes = {name: _attribute(gm, name) for name in named}
    result = fx.GraphModule(attributes, graph)
    result.meta.update(gm.meta)
    copy_structures(gm, result)
    return result


def restructure(gm: fx.GraphModule, structure: pytree.TreeSpec) -> fx.GraphModule:
    """Return a module of the graph of `gm` whose results are arranged in another structure."""
    set_output_structure(gm, structure)
    return assemble(gm, gm.graph)


def tensor_attribute(gm: fx.GraphModule, name: str) -> torch.Tensor:
    """Return the parameter, buffer or constant called `name` (a qualified name)."""
    value = _attribute(gm, name)
    if not isinstance(value, torch.Tensor):
        raise PassError(f"`{name}` is a {type(value).__name__}, not a tensor.")
    return value


def constant(node: Any, gm: fx.GraphModule) -> torch.Tensor | None:
    """Return the tensor `node` reads from the module, or None if it is not a plain attribute read."""
    if isinstance(node, fx.Node) and node.op == "get_attr":
        value = _attribute(gm, str(node.target))
        return value if isinstance(value, torch.Tensor) else None
    return None


def readers(graph: fx.Graph, name: str) -> list[fx.Node]:
    """List the nodes that read the attribute `name`; more than one means a shared weight."""
    return [node for node in graph.nodes if node.op == "get_attr" and node.target == name]


def fake_mode_of(gm: fx.GraphModule) -> FakeTensorMode:
    """Return the fake mode whose symbols the graph's `meta["val"]` are written in."""
    values = [node.meta["val"] for node in gm.graph.nodes if "val" in node.meta]
    mode = detect_fake_mode(values)
    return mode or FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def erase_dead(graph: fx.Graph) -> None:
    """Erase calls and attribute reads nobody uses; inputs and calls with side effects stay."""
    for node in reversed(list(graph.nodes)):
        if node.users or node.op in ("placeholder", "output"):
            continue
        if node.op == "get_attr" or not (node.is_impure() or written_inputs(node)):
            graph.erase_node(node)


def arguments(node: fx.Node, names: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of an operator call by schema name, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    bound: dict[str, Any] = {}
    for position, argument in enumerate(schema.arguments):
        if position < len(node.args):
            bound[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return {name: bound[name] for name in names} if names else bound


def _attribute(gm: torch.nn.Module, name: str) -> Any:
    value: Any = gm
    for part in name.split("."):
        value = getattr(value, part)
    return value


def behind_inputs(node: fx.Node) -> fx.Node:
    """Return the node behind which a call on `node` may stand: behind every input for an input or a stored tensor."""
    if node.op not in ("placeholder", "get_attr"):
        return node
    while node.next.op in ("placeholder", "get_attr"):
        node = node.next
    return node
