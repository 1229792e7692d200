"""Running a module without a trace on its buffers."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from graphopt.ir.aliasing import Storages
from graphopt.ir.graph import constant, tensor_attribute
from graphopt.ir.ownership import storage_key
from graphopt.ir.torch_internals import pytree


@contextlib.contextmanager
def with_its_buffers(model: nn.Module) -> Iterator[None]:
    """Give buffers back the tensors and values they had: a forward may write to them."""
    held = list(_buffers(model))
    values = [tensor.detach().clone() for _, _, tensor in held]
    try:
        yield
    finally:
        with torch.no_grad():
            for (table, name, tensor), value in zip(held, values, strict=True):
                table[name] = tensor
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


def _buffers(model: nn.Module) -> Iterator[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]]:
    for module in model.modules():
        for name, tensor in module._buffers.items():
            if tensor is not None:
                yield module._buffers, name, tensor


_written: weakref.WeakKeyDictionary[fx.GraphModule, tuple[str, tuple[str, ...]]] = weakref.WeakKeyDictionary()


def call_undoing_writes(gm: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a graph and give what it writes to by itself its values back.

    Statistics that training moves are not among it.
    """
    written = [tensor_attribute(gm, name) for name in names_written(gm)]
    if not written:
        return gm(*args, **kwargs)
    values = [tensor.detach().clone() for tensor in written]
    places = set(map(storage_key, written))
    try:
        return pytree.tree_map_only(
            torch.Tensor,
            lambda found: found.clone() if storage_key(found) in places else found,
            gm(*args, **kwargs),
        )
    finally:
        with torch.no_grad():
            for tensor, value in zip(written, values, strict=True):
                tensor.copy_(value)


def names_written(gm: fx.GraphModule) -> tuple[str, ...]:
    """Return the names of the tensors that a graph writes to by itself, when it is called in evaluation mode."""
    code, names = _written.get(gm, ("", ()))
    if code != gm.code:
        storages = Storages(gm.graph)
        reads = [node for node in gm.graph.find_nodes(op="get_attr") if constant(node, gm) is not None]
        names = tuple(dict.fromkeys(str(node.target) for node in reads if storages.writes(node)))
        _written[gm] = gm.code, names
    return names
