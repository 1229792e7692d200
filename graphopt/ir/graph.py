"""Editing a program's graph without losing what every node must carry.

A pass opens an `Editor` on a copy of the program, inserts, replaces and re-weights nodes through it, and
closes it: each inserted node has `meta["val"]` from fake propagation and an origin naming the pass and site.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_symbols
from torch.utils import _pytree as pytree

from graphopt.errors import PassError
from graphopt.ir.aliasing import written_inputs
from graphopt.ir.provenance import Origin, op_name, origin, record, user_line
from graphopt.ir.regions import Region, inputs, region, results


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
    graph.set_codegen(gm.graph._codegen)
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


def assemble(gm: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """Build a GraphModule of `graph` with the attributes of `gm` that it reads, shared."""
    attributes = {node.target: _attribute(gm, node.target) for node in graph.nodes if node.op == "get_attr"}
    result = fx.GraphModule(attributes, graph)
    result.meta.update(gm.meta)
    for name in ("_in_spec", "_out_spec"):
        if hasattr(gm, name):
            setattr(result, name, getattr(gm, name))
    return result


def restructure(gm: fx.GraphModule, structure: pytree.TreeSpec) -> fx.GraphModule:
    """Return a module of the graph of `gm` whose results are arranged in another structure.

    The generated code reads it from the module, the interpreter from the code generator (torch 2.13).
    """
    generator: Any = copy.copy(gm.graph._codegen)
    generator.pytree_info = generator.pytree_info._replace(out_spec=structure)
    gm.graph.set_codegen(generator)
    result = assemble(gm, gm.graph)
    result._out_spec = structure
    return result


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


class Editor:
    """Inserts and replaces nodes of one graph on behalf of one pass."""

    def __init__(self, gm: fx.GraphModule, made_by: str, mode: FakeTensorMode | None = None) -> None:
        self.gm = gm
        self.graph = gm.graph
        self._made_by = made_by
        self._mode = fake_mode_of(gm) if mode is None else mode

    def call(self, target: Callable[..., Any], *args: Any, like: fx.Node, site: str = "", **kwargs: Any) -> fx.Node:
        """Insert a call at the graph's insertion point, descending from `like`.

        Use inside `with editor.graph.inserting_before(node):`.
        """
        node = self.graph.call_function(target, args, kwargs)
        self._describe(node, like, site)
        self.propagate(node)
        return node

    def read(self, name: str, *, like: fx.Node | None = None, site: str = "") -> fx.Node:
        """Insert a read of the attribute `name`, which `put` has stored."""
        with self._mode:
            node = self.graph.get_attr(name)
        if like is not None:
            self._describe(node, like, site)
        node.meta["val"] = self.fake(tensor_attribute(self.gm, name))
        return node

    def put(self, name: str, tensor: torch.Tensor, *, trainable: bool) -> str:
        """Store `tensor` under `name` as a parameter (`trainable`) or buffer; reads of it are refreshed.

        Integer tensors are always buffers. Returns the name.
        """
        *path, leaf = name.split(".")
        owner: torch.nn.Module = self.gm
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = getattr(owner, part)
        if hasattr(owner, leaf):
            delattr(owner, leaf)
        value = tensor.detach()
        if trainable and value.is_floating_point():
            owner.register_parameter(leaf, torch.nn.Parameter(value))
        else:
            owner.register_buffer(leaf, value)
        for node in readers(self.graph, name):
            node.meta["val"] = self.fake(tensor_attribute(self.gm, name))
            node.meta.pop("tensor_meta", None)
        return name

    def new_name(self, wanted: str) -> str:
        """Return `wanted`, or `wanted_1`, ... : the first attribute name that is not taken."""
        name, count = wanted, 0
        while _has_attribute(self.gm, name):
            count += 1
            name = f"{wanted}_{count}"
        return name

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let every user of `old` use `new` instead and erase `old`."""
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def propagate(self, node: fx.Node) -> None:
        """Recompute `meta["val"]` of one call from those of its inputs; of a region, of every call in it too."""
        found = region(node, self.gm)
        if found is not None:
            self._propagate_region(found)
            return
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        try:
            # Without the Python dispatcher aten.pad, among others, fixes a symbolic batch to its example size.
            with enable_python_dispatcher(), self._mode:
                value = node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as err:  # whatever an operator's fake kernel raises is about this one node
            raise PassError(
                f"Pass `{self._made_by}` built `{node.format_node()}`, which cannot run on the shapes it is "
                f"given: {err}. It descends from {user_line(node) or 'an unknown line'}. This is a bug in the pass."
            ) from err
        if "val" in node.meta and torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ()):
            value = pytree.tree_map(self._like, node.meta["val"], value)  # how many there are is as unknown as before
        node.meta["val"] = value
        node.meta.pop("tensor_meta", None)

    def propagate_from(self, starts: Iterable[fx.Node]) -> None:
        """Recompute `meta["val"]` of every call downstream of `starts`."""
        dirty = set(starts)
        for node in self.graph.nodes:
            if node.op == "call_function" and (node in dirty or dirty.intersection(node.all_input_nodes)):
                self.propagate(node)
                dirty.add(node)

    def _propagate_region(self, found: Region) -> None:
        for body in found.bodies:
            for position, (inner, operand) in enumerate(zip(inputs(body), found.operands, strict=True)):
                value = operand.meta["val"] if isinstance(operand, fx.Node) else operand
                inner.meta["val"] = self._like(inner.meta["val"], value, skip=found.sliced(position))
            with found.context():
                within = Editor(body, self._made_by, self._mode)
                within.propagate_from(node for node in body.graph.nodes if not node.all_input_nodes)
        flowing = [value.meta["val"] if isinstance(value, fx.Node) else value for value in results(found.main)]
        was = found.node.meta["val"]
        now = [
            self._like(old, value, stacked=found.stacked(position))
            for position, (old, value) in enumerate(zip(was, flowing, strict=True))
        ]
        found.node.meta["val"] = type(was)(now)

    def _like(self, was: Any, now: Any, *, skip: bool = False, stacked: bool = False) -> Any:
        """Return a fake tensor of the dtype and sizes of `now`; sizes in symbols that `was` lacks stay as they were.

        Args:
            was: what was recorded so far, in symbols of its own.
            now: what flows there.
            skip: `now` has one more dimension, in front.
            stacked: `was` has one more dimension, in front.
        """
        if not isinstance(was, torch.Tensor) or not isinstance(now, torch.Tensor):
            return was
        sizes = [*was.shape[:1], *now.shape] if stacked else list(now.shape[1:] if skip else now.shape)
        kept = [
            old if isinstance(old, torch.SymInt) and free_symbols(old) != free_symbols(new) else new
            for old, new in zip(was.shape, sizes, strict=True)
        ]
        with self._mode:
            return was.new_empty(kept, dtype=now.dtype)

    def fake(self, tensor: torch.Tensor) -> FakeTensor:
        """Return the fake tensor that stands for a parameter or buffer in the graph's metadata."""
        return self._mode.from_tensor(tensor, static_shapes=True)

    def finish(self) -> fx.GraphModule:
        """Drop dead nodes and unread attributes, recompile, and return the graph module."""
        erase_dead(self.graph)
        result = assemble(self.gm, self.graph)
        result.recompile()
        return result

    def _describe(self, node: fx.Node, like: fx.Node, site: str) -> None:
        for key in ("nn_module_stack", "stack_trace"):
            if key in like.meta:
                node.meta[key] = like.meta[key]
        base = origin(like) or Origin(like.name, "", op_name(like))
        record(node, Origin(base.node, base.module, base.op, self._made_by, site or like.name))


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


def _has_attribute(gm: torch.nn.Module, name: str) -> bool:
    value: Any = gm
    for part in name.split("."):
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True
