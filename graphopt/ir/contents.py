"""The bytes of a tensor, for digests."""

from __future__ import annotations

import torch


def content(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor's elements in their order, whatever it is a view of and wherever it is."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
