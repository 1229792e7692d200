"""Whose a program's tensors are: what was captured of a module may read the module's own, which others may train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set

import torch
from torch import nn


def storages(module: nn.Module) -> frozenset[int]:
    """Return where the tensors of a module lie."""
    return frozenset(place(tensor) for _, _, tensor in _tensors(module))


def own_tensors(modules: Iterable[nn.Module], lent: Set[int] | None = None) -> dict[int, torch.Tensor]:
    """Give modules copies of their tensors, in place: of each tensor one, wherever it is read.

    Args:
        modules: graph modules of programs.
        lent: only what lies in these storages, see `storages`; None: everything.

    Returns:
        The copy of each tensor, by the id of that.
    """
    own: dict[int, torch.Tensor] = {}
    held = []  # an id is a tensor's for as long as that lives
    for module in modules:
        for table, name, tensor in list(_tensors(module)):
            if lent is not None and place(tensor) not in lent:
                continue
            if id(tensor) not in own:
                held.append(tensor)
                own[id(tensor)] = _clone(tensor)
            table[name] = own[id(tensor)]
    return own


def _tensors(module: nn.Module) -> Iterator[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]]:
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    yield table, name, tensor  # type: ignore[misc]


def place(tensor: torch.Tensor) -> int:
    """Return where the storage of a tensor lies."""
    return tensor.untyped_storage().data_ptr()


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    clone = tensor.detach().clone()
    return nn.Parameter(clone, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else clone
