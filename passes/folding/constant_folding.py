"""Compute ahead of time whatever depends on no input: masks, position tables, normalised weights.

    mask = zeros(64, 49, 49); mask[..].fill_(1.); y = x + mask      y = x + stored
    y = linear(x, g * v / norm(v))                                  y = linear(x, stored)

1. A value is constant if its operator is deterministic, its sizes are numbers and all its tensor inputs are constant;
   `new_zeros(x, ...)` and the like read no more of x than dtype and device.
2. Values that share memory are constant together: all writes to it must be constant, and nobody else may read it
   before the last write. A buffer that the graph writes to keeps its value between calls and is none.
3. What is kept of a constant region are the values that the rest of the graph reads. One that would take too many
   bytes (`growth`) is left alone, and what it is computed from is tried instead.

Evaluated with the program's own operators in its own precision. Equal constants are stored once. A constant that comes
from a parameter is a parameter, so that it can be trained.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.ir.aliasing import Storages, written_inputs
from graphopt.ir.editor import Editor
from graphopt.ir.graph import constant, erase_dead, tensor_attribute
from graphopt.ir.operators import FILLED_LIKE, UNINITIALISED, writes_in_place
from graphopt.ir.program import Program
from graphopt.ir.provenance import module_path
from graphopt.ir.torch_internals import OpOverload
from graphopt.passes.folding.growth import too_large
from graphopt.passes.folding.likeness import indistinguishable
from graphopt.pipeline.plan import Refusal

aten = torch.ops.aten
Values = dict[fx.Node, Any]  # a tensor, or several of them, by the node that computes it


@dataclass(frozen=True, slots=True)
class ConstantFold:
    """One value that is stored instead of computed."""

    node: str  # the node that computes it
    name: str  # the attribute it is stored under
    trainable: bool  # whether it comes from a parameter


def find_constants(
    program: Program, *, taken: Iterable[str] = ()
) -> tuple[list[ConstantFold], dict[str, torch.Tensor], list[Refusal]]:
    """List the values to store, the tensors by attribute name (none of `taken`), and the values that are too large."""
    gm = program.graph_module
    storages = Storages(gm.graph)
    constants = _constants(gm, storages)
    chosen, refusals = _worth_storing(gm, constants, storages)
    values = _evaluate(gm, _needed(chosen, constants, storages))
    folds: list[ConstantFold] = []
    tensors: dict[str, torch.Tensor] = {}
    editor = Editor(gm, "fold")
    for node in chosen:
        value = values[node]
        assert isinstance(value, torch.Tensor)
        learned = value.is_floating_point() or value.is_complex()
        trainable = learned and _kind(gm, node) is not None
        name = _twin(value, trainable, folds, tensors) or editor.new_name(_wanted_name(node), taken={*taken, *tensors})
        tensors.setdefault(name, value.detach().clone(memory_format=torch.contiguous_format))
        folds.append(ConstantFold(node.name, name, trainable))
    return folds, tensors, refusals


def store_constants(program: Program, folds: Sequence[ConstantFold], tensors: Mapping[str, torch.Tensor]) -> Program:
    """Read the stored tensors instead of computing them."""
    program = program.copy()
    editor = Editor(program.graph_module, "fold")
    nodes = {node.name: node for node in program.graph.nodes}
    storages = Storages(program.graph)
    changed: list[fx.Node] = []
    for fold in folds:
        node = nodes[fold.node]
        kind = _kind(program.graph_module, node)
        editor.put(fold.name, tensors[fold.name], trainable=fold.trainable, kind_of=kind)
        with editor.graph.inserting_before(node):
            stored = editor.read(fold.name, like=node, site=fold.node)
        # views that are written through must not write to what is stored
        keep = storages.members(node) if storages.writes(node) else []
        readers = [user for user in node.users if user not in keep]
        if not indistinguishable(node, stored):
            changed += [user for user in readers if user.op == "call_function"]
        node.replace_all_uses_with(stored, delete_user_cb=readers.__contains__)
    editor.propagate_from(changed)
    _erase_dead_writes(editor.graph)
    return program.with_graph(editor.finish())


def _constants(gm: fx.GraphModule, storages: Storages) -> set[fx.Node]:
    """Return every node whose value depends on no input (cases 1 and 2 of the module's list)."""
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    barred: set[fx.Node] = set()
    while True:
        found: set[fx.Node] = set()
        for node in gm.graph.nodes:
            if node not in barred and (constant(node, gm) is not None or _is_constant_call(node, found)):
                found.add(node)
        spoiled = [node for node in gm.graph.nodes if node in found and _memory_changes(node, found, storages, order)]
        if not spoiled:
            return found
        barred.update(member for node in spoiled for member in storages.members(node))


def _is_constant_call(node: fx.Node, known: set[fx.Node]) -> bool:
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return node.args[0] in known
    if not isinstance(node.target, OpOverload) or node.target.namespace not in ("aten", "prims"):
        return False
    if node in UNINITIALISED or torch.Tag.nondeterministic_seeded in node.target.tags or not _is_static(node):
        return False
    inputs = node.all_input_nodes
    # the first input only tells dtype and device (and shape, which is a number where it matters)
    if node in FILLED_LIKE and not writes_in_place(node) and inputs and inputs[0] is node.args[0]:
        inputs = [source for source in inputs if source is not node.args[0] or source in _beyond_first(node)]
    return all(source in known for source in inputs)


def _beyond_first(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg((node.args[1:], node.kwargs), found.append)
    return found


def _is_static(node: fx.Node) -> bool:
    """Whether `node` has a tensor (or several) with sizes that are numbers."""
    value = node.meta.get("val")
    tensors = value if isinstance(value, list | tuple) else [value]
    return bool(tensors) and all(
        isinstance(t, torch.Tensor) and all(isinstance(size, int) for size in t.shape) for t in tensors
    )


def _memory_changes(node: fx.Node, known: set[fx.Node], storages: Storages, order: Mapping[fx.Node, int]) -> bool:
    """Whether someone outside `known` could see another value in the memory of `node` than its last one."""
    writes = storages.writes(node)
    if not writes:
        return False
    members = storages.members(node)
    if any(write not in known for write in writes) or any(m.op != "call_function" for m in members):
        return True
    last = order[writes[-1]]
    return any(user not in known and order[user] < last for member in members for user in member.users)


def _worth_storing(
    gm: fx.GraphModule, constants: set[fx.Node], storages: Storages
) -> tuple[list[fx.Node], list[Refusal]]:
    """Choose the constants that the rest of the graph reads; walk back from those that are too large."""
    chosen: dict[fx.Node, None] = {}
    refusals: list[Refusal] = []
    outside = {user for node in gm.graph.nodes for user in node.users} - constants
    for node in reversed(gm.graph.nodes):
        if node not in constants or node.op == "get_attr" or not outside.intersection(node.users):
            continue
        if not isinstance(node.meta["val"], torch.Tensor) or written_inputs(node):
            outside.add(node)
            continue
        replaced = _replaced(gm, node, constants - outside)
        if replaced == 0 and any(member.op == "get_attr" for member in storages.members(node)):
            continue  # a view of an attribute that stays: storing it again would save nothing
        reason = too_large(_bytes(node.meta["val"]), replaced)
        if not reason:
            chosen[node] = None
            continue
        refusals.append(Refusal(node.name, f"it is constant, but {reason}", "a constant would be too large"))
        if not storages.writes(node):
            outside.add(node)
    ordered = [node for node in gm.graph.nodes if node in chosen]
    return ordered, refusals[::-1]


def _replaced(gm: fx.GraphModule, node: fx.Node, constants: set[fx.Node]) -> int:
    """Return the bytes of the attributes that `node` is computed from and only `constants` read."""
    tensors = {
        source.target: _bytes(tensor_attribute(gm, str(source.target)))
        for source in _sources([node])
        if all(user in constants for user in source.users)
    }
    return sum(tensors.values())


def _kind(gm: fx.GraphModule, node: fx.Node) -> torch.nn.Parameter | None:
    """Return a parameter that a constant is computed from, one that is trained if any is."""
    found = [constant(source, gm) for source in _sources([node])]
    parameters = [tensor for tensor in found if isinstance(tensor, torch.nn.Parameter)]
    return next((tensor for tensor in parameters if tensor.requires_grad), parameters[0] if parameters else None)


def _sources(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """List the attribute reads that `nodes` are computed from."""
    return [node for node in _ancestors(nodes) if node.op == "get_attr"]


def _ancestors(nodes: Iterable[fx.Node]) -> dict[fx.Node, None]:
    found: dict[fx.Node, None] = {}
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found[node] = None
            pending += node.all_input_nodes
    return found


def _needed(chosen: Sequence[fx.Node], constants: set[fx.Node], storages: Storages) -> list[fx.Node]:
    """List the constants that must be run, in graph order: what `chosen` reads, and the writes to its memory."""
    if not chosen:
        return []
    needed: dict[fx.Node, None] = {}
    pending = list(chosen)
    while pending:
        fresh = [node for node in _ancestors(pending) if node in constants and node not in needed]
        needed.update(dict.fromkeys(fresh))
        pending = [write for node in fresh for write in storages.writes(node) if write not in needed]
    return [node for node in chosen[0].graph.nodes if node in needed]


def _evaluate(gm: fx.GraphModule, nodes: Sequence[fx.Node]) -> Values:
    """Run constant nodes in order on the real tensors. None of them writes to an attribute (case 2)."""
    values: Values = {}
    with torch.no_grad():
        for node in nodes:
            if node.op == "get_attr":
                values[node] = tensor_attribute(gm, str(node.target)).detach()
                continue
            # Where only dtype and device of an input matter, any tensor of them will do.
            args, kwargs = fx.map_arg(
                (node.args, node.kwargs), lambda n: values[n] if n in values else _stand_in(n.meta["val"])
            )
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values


def _stand_in(value: torch.Tensor) -> torch.Tensor:
    sizes = [size if isinstance(size, int) else 1 for size in value.shape]
    return torch.zeros(1, dtype=value.dtype, device=value.device).expand(sizes)


def _twin(
    value: torch.Tensor, trainable: bool, folds: Sequence[ConstantFold], tensors: Mapping[str, torch.Tensor]
) -> str:
    """Return the name of an equal constant that is stored already. Parameters stay apart: they may be trained."""
    if trainable:
        return ""
    for fold in folds:
        other = tensors[fold.name]
        if (
            not fold.trainable
            and other.dtype == value.dtype
            and other.shape == value.shape
            and torch.equal(other, value)
        ):
            return fold.name
    return ""


def _wanted_name(node: fx.Node) -> str:
    """Return "fc.weight" for what the module `fc` reads as its weight, otherwise the module and the node's name."""
    for user in node.users:
        if not isinstance(user.target, OpOverload):
            continue
        for argument, value in zip(user.target._schema.arguments, user.args, strict=False):
            if value is node and argument.name in ("weight", "bias"):
                return ".".join(filter(None, (module_path(user), argument.name)))
    return ".".join(filter(None, (module_path(node), node.name)))


def _erase_dead_writes(graph: fx.Graph) -> None:
    """Erase in-place calls on memory that nobody reads any more; dead-code elimination keeps them as side effects."""
    while True:
        erase_dead(graph)
        storages = Storages(graph)
        dead = [
            node
            for node in graph.nodes
            if written_inputs(node)
            and not node.users
            and not any(_is_read(member, storages) for member in storages.members(node))
        ]
        if not dead:
            return
        for node in dead:
            graph.erase_node(node)


def _is_read(member: fx.Node, storages: Storages) -> bool:
    """Whether `member` outlives the call or is read by anything but views of, and writes to, the same memory."""
    if member.op != "call_function":
        return True
    return any(storages.owner(user) is not storages.owner(member) for user in member.users)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
