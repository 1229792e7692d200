"""Puts 16 bits into a graph.

    linear(x, w, b)                  ->    linear(to(x, float16), w', b')
    softmax(x), x in float16         ->    softmax(to(x, float32))
    attention(q, k, v, mask)         ->    attention(q', k', v', to(clamp(mask), float16))

A value is converted once for all that read it so, right behind where it is computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.aliasing import Storages
from graphopt.ir.editor import Editor
from graphopt.ir.graph import behind_inputs, readers, tensor_attribute
from graphopt.ir.operators import CASTS
from graphopt.ir.ownership import change_tensors, memory_key
from graphopt.passes.layers.weighted_call import set_argument
from graphopt.passes.precision.placement import clamped_mask

aten = torch.ops.aten


def store(editor: Editor, names: Iterable[str], dtype: torch.dtype) -> None:
    """Round stored tensors; those that are one, under several names, stay one."""
    listed = list(names)
    tensors = [tensor_attribute(editor.gm, name) for name in listed]
    rounded = {memory_key(tensor): tensor.detach().to(dtype) for tensor in tensors}
    change_tensors([editor.gm], lambda tensor: rounded.get(memory_key(tensor), tensor))
    for node in (node for name in listed for node in readers(editor.graph, name)):
        node.meta["val"] = editor.fake(tensor_attribute(editor.gm, str(node.target)))
        node.meta.pop("tensor_meta", None)


def read_in_float32(editor: Editor, names: Iterable[str]) -> None:
    """Convert stored tensors back where they are read."""
    for name in names:
        reads = readers(editor.graph, name)
        users = [list(node.users) for node in reads]
        with editor.graph.inserting_after(behind_inputs(reads[0])):
            wide = editor.call(aten.to.dtype, reads[0], torch.float32, like=reads[0], site=name)
        for node, its in zip(reads, users, strict=True):
            for user in its:
                user.replace_input_with(node, wide)


class Caster:
    """Lets calls compute in 16 bits."""

    def __init__(self, editor: Editor, dtype: torch.dtype, calls: Iterable[str]) -> None:
        self._editor = editor
        self._dtype = dtype
        self._calls = frozenset(calls)
        self._cast: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        self._clamped: dict[fx.Node, fx.Node] = {}
        self._storages = Storages(editor.graph)

    def run(self) -> None:
        """Rewrite every call in order, and what is returned."""
        for node in list(self._editor.graph.nodes):
            if node.name in self._calls:
                self._compute(node)
            elif node.op in ("call_function", "output"):
                self._swap(node, self._wide)

    def _compute(self, node: fx.Node) -> None:
        mask = clamped_mask(node)
        if mask is not None:
            set_argument(node, "attn_mask", self._in_range(mask))
        self._swap(node, self._narrow)
        self._editor.propagate(node)

    def _swap(self, node: fx.Node, change: Any) -> None:
        node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), change)

    def _wide(self, value: fx.Node) -> fx.Node:
        """Return a value in float32 where it was made narrow; what the model itself has narrow stays so."""
        return self._as(value, torch.float32) if value.name in self._calls and _is(value, self._dtype) else value

    def _narrow(self, value: fx.Node) -> fx.Node:
        """Return a value in 16 bits where it is float32."""
        if not _is(value, torch.float32):
            return value
        source = self._cast_from(value)
        return source if source is not None and _is(source, self._dtype) else self._as(value, self._dtype)

    def _as(self, value: fx.Node, wanted: torch.dtype) -> fx.Node:
        if (value, wanted) not in self._cast:
            source = self._cast_from(value)
            direct = source is not None and (_is(source, torch.bool) or _is(source, torch.float64))
            with self._editor.graph.inserting_after(behind_inputs(value)):
                cast = self._editor.call(
                    aten.to.dtype, source if direct else value, wanted, like=value, site=value.name
                )
            self._cast[value, wanted] = cast
        return self._cast[value, wanted]

    def _cast_from(self, node: fx.Node) -> fx.Node | None:
        """Return what a call converts, None where it does something else or that is written to."""
        source = node.args[0] if node in CASTS else None
        if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), Tensor):
            return None
        return None if self._storages.writes(source) else source

    def _in_range(self, mask: fx.Node) -> fx.Node:
        """Clamp a mask so that a score can be added to it: of a row that is masked whole, -inf would make NaN."""
        if mask not in self._clamped:
            bound = torch.finfo(self._dtype).max / 2
            wide = self._wide(mask)
            with self._editor.graph.inserting_after(behind_inputs(wide)):
                self._clamped[mask] = self._editor.call(
                    aten.clamp.default, wide, -bound, bound, like=mask, site=mask.name
                )
        return self._clamped[mask]


def _is(node: fx.Node, dtype: torch.dtype) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype is dtype
