"""Compute ahead of time whatever depends on no input: masks, position tables, normalised weights.

    mask = zeros(64, 49, 49); mask[..].fill_(1.); y = x + mask      y = x + stored
    y = linear(x, g * v / norm(v))                                  y = linear(x, stored)

Which values are, and which of them are worth it, says `passes.layers.constants`.

Evaluated with the program's own operators in its own precision. Equal constants are stored once. A constant that comes
from a parameter is a parameter, so that it can be trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.ir.aliasing import Storages, written_inputs
from graphopt.ir.editor import Editor
from graphopt.ir.graph import constant, erase_dead, tensor_attribute
from graphopt.ir.program import Program
from graphopt.ir.provenance import module_path
from graphopt.ir.torch_internals import OpOverload
from graphopt.passes.folding.likeness import indistinguishable
from graphopt.passes.layers.constants import ancestors, find_all_constants, sources, worth_storing
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
    constants = find_all_constants(gm, storages)
    chosen, refusals = worth_storing(gm, constants, storages)
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
    """Read the stored tensors instead of computing them.

    Raises:
        PassError: one is not of the shape and type of what it stands for.
    """
    program = program.copy()
    editor = Editor(program.graph_module, "fold")
    nodes = {node.name: node for node in program.graph.nodes}
    storages = Storages(program.graph)
    changed: list[fx.Node] = []
    for fold in folds:
        node = nodes[fold.node]
        _check_fits(node, tensors[fold.name])
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


def _check_fits(node: fx.Node, stored: torch.Tensor) -> None:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or (value.shape, value.dtype) != (stored.shape, stored.dtype):
        raise PassError(
            f"The plan stores {stored.dtype} of shape {tuple(stored.shape)} for `{node.name}`, which is another thing "
            "in this program. Make the plan again."
        )


def _kind(gm: fx.GraphModule, node: fx.Node) -> torch.nn.Parameter | None:
    """Return a parameter that a constant is computed from, one that is trained if any is."""
    found = [constant(source, gm) for source in sources([node])]
    parameters = [tensor for tensor in found if isinstance(tensor, torch.nn.Parameter)]
    return next((tensor for tensor in parameters if tensor.requires_grad), parameters[0] if parameters else None)


def _needed(chosen: Sequence[fx.Node], constants: set[fx.Node], storages: Storages) -> list[fx.Node]:
    """List the constants that must be run, in graph order: what `chosen` reads, and the writes to its memory."""
    if not chosen:
        return []
    needed: dict[fx.Node, None] = {}
    pending = list(chosen)
    while pending:
        fresh = [node for node in ancestors(pending) if node in constants and node not in needed]
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
