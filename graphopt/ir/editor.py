"""Editing a program's graph without losing what every node must carry.

A pass opens an `Editor` on a copy of the program, inserts, replaces and re-weights nodes through it, and
closes it: each inserted node has `meta["val"]` from fake propagation and an origin naming the pass and site.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Set
from typing import Any

import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.ir.contents import resolved
from graphopt.ir.devices import device_of, held_by
from graphopt.ir.graph import assemble, erase_dead, fake_mode_of, readers, tensor_attribute
from graphopt.ir.names import unused
from graphopt.ir.operators import short_name
from graphopt.ir.propagation import Propagation, unbacked
from graphopt.ir.provenance import Origin, origin, record, user_line
from graphopt.ir.regions import Region, inputs, region, results
from graphopt.ir.torch_internals import FakeTensor, FakeTensorMode, free_symbols, pytree
from graphopt.ir.zeros import hold, holds


class Editor:
    """Inserts and replaces nodes of one graph on behalf of one pass."""

    def __init__(self, gm: fx.GraphModule, made_by: str, mode: FakeTensorMode | None = None) -> None:
        self.gm = gm
        self.graph = gm.graph
        self._made_by = made_by
        self._mode = fake_mode_of(gm) if mode is None else mode
        self._propagation = Propagation(self._mode, "editing")

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

    def put(
        self, name: str, tensor: torch.Tensor, *, trainable: bool = False, kind_of: torch.Tensor | None = None
    ) -> str:
        """Store `tensor` under `name` as a parameter or buffer; reads of it are refreshed.

        Args:
            name: what is stored under it so far goes. What takes the place of a frozen parameter is frozen.
            tensor: integers are always a buffer.
            trainable: whether it is a parameter.
            kind_of: what it is made of: a parameter that is trained, one that is frozen, or a buffer like it.

        Returns:
            The name.
        """
        *path, leaf = name.split(".")
        owner: torch.nn.Module = self.gm
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = getattr(owner, part)
        old = getattr(owner, leaf, None)
        if hasattr(owner, leaf):
            delattr(owner, leaf)
        value = resolved(tensor.detach().to(self._device))
        like = old if isinstance(old, torch.nn.Parameter) else kind_of
        parameter = trainable or isinstance(kind_of, torch.nn.Parameter)
        if parameter and (value.is_floating_point() or value.is_complex()):
            trained = like.requires_grad if isinstance(like, torch.nn.Parameter) else True
            owner.register_parameter(leaf, torch.nn.Parameter(value, requires_grad=trained))
        else:
            owner.register_buffer(leaf, value)
        for node in readers(self.graph, name):
            node.meta["val"] = self.fake(tensor_attribute(self.gm, name))
            node.meta.pop("tensor_meta", None)
        return name

    @functools.cached_property
    def _device(self) -> torch.device:
        inputs = (node.meta.get("val") for node in self.graph.nodes if node.op == "placeholder")
        known = next((value.device for value in inputs if isinstance(value, torch.Tensor)), None)
        return known or device_of(held_by(self.gm))

    def new_name(self, wanted: str, *, taken: Set[str] = frozenset()) -> str:
        """Return `wanted`, or `wanted_1`, ... : the first that is neither an attribute nor `taken`."""
        return unused(wanted, lambda name: name in taken or _has_attribute(self.gm, name))

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
            value = self._propagation.call(node, args, kwargs)
        except Exception as err:  # whatever an operator's fake kernel raises is about this one node
            raise PassError(
                f"Pass `{self._made_by}` built `{node.format_node()}`, which cannot run on the shapes it is "
                f"given: {err}. It descends from {user_line(node) or 'an unknown line'}. This is a bug in the pass."
            ) from err
        if "val" in node.meta and unbacked(value) - unbacked([used.meta.get("val") for used in node.all_input_nodes]):
            leaves, structure = pytree.tree_flatten(value)  # how many there are is as unknown as before
            was = pytree.tree_leaves(node.meta["val"])
            value = pytree.tree_unflatten(map(self._like, was, leaves), structure)
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
        """Drop dead nodes and unread attributes, and return the graph module."""
        erase_dead(self.graph)
        return assemble(self.gm, self.graph)

    def _describe(self, node: fx.Node, like: fx.Node, site: str) -> None:
        for key in ("nn_module_stack", "stack_trace"):
            if key in like.meta:
                node.meta[key] = like.meta[key]
        if holds(like):
            hold(node)
        base = origin(like) or Origin(like.name, "", short_name(like))
        record(node, Origin(base.node, base.module, base.op, self._made_by, site or like.name))


def _has_attribute(gm: torch.nn.Module, name: str) -> bool:
    value: Any = gm
    for part in name.split("."):
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True
