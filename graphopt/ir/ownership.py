"""Which tensors are one memory, and whose: a program may read those of the module that it was captured from."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Set
from typing import Any

import torch
from torch import nn

from graphopt.ir.torch_internals import FakeTensor


def memory_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return what two tensors have in common iff they are the same elements in the same order."""
    if not _has_memory(tensor):
        return (id(tensor),)
    view = tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype
    return (*storage_key(tensor), *view, tensor.is_conj(), tensor.is_neg())


def storage_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return what two tensors have in common iff they lie in the same storage."""
    if not _has_memory(tensor) or not tensor.untyped_storage().nbytes():
        return (id(tensor),)
    return (str(tensor.device), tensor.untyped_storage().data_ptr())


def _has_memory(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, FakeTensor) and tensor.device.type != "meta" and tensor.layout == torch.strided


def storage_keys(module: nn.Module) -> frozenset[Hashable]:
    """Return where the tensors of a module lie."""
    return frozenset(map(storage_key, (*module.parameters(), *module.buffers())))


def own_tensors(modules: Iterable[nn.Module], lent: Set[Hashable] | None = None) -> dict[int, torch.Tensor]:
    """Give modules copies of their tensors, in place: of each tensor one, wherever it is read.

    Args:
        modules: graph modules of programs.
        lent: only what lies in these storages, see `storage_keys`; None: everything.

    Returns:
        The copy of each tensor, by the id of that.
    """
    return change_tensors(modules, lambda one: one.clone() if lent is None or storage_key(one) in lent else one)


def change_tensors(
    modules: Iterable[nn.Module], change: Callable[[torch.Tensor], torch.Tensor]
) -> dict[int, torch.Tensor]:
    """Put others in the place of tensors: of each one, wherever it is read, and none where `change` returns it itself.

    Returns:
        What took the place of each tensor, by the id of that.
    """
    made: dict[int, torch.Tensor] = {}
    held = []  # an id is a tensor's for as long as that lives
    for part in (part for module in modules for part in module.modules()):
        for table in (part._parameters, part._buffers):
            for name, tensor in [(name, tensor) for name, tensor in table.items() if tensor is not None]:
                if id(tensor) not in made:
                    plain = tensor.detach()
                    other = change(plain)
                    if other is plain:
                        continue
                    if isinstance(tensor, nn.Parameter):
                        other = nn.Parameter(other, tensor.requires_grad)
                    held.append(tensor)
                    made[id(tensor)] = other
                table[name] = made[id(tensor)]  # type: ignore[assignment]
    return made
