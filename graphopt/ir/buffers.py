"""Running a module without a trace on its buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def with_its_buffers(model: nn.Module) -> Iterator[None]:
    """Give buffers back the tensors and values they had: a forward may write to them."""
    held = [(table, name, tensor) for table, name, tensor in _buffers(model)]
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
