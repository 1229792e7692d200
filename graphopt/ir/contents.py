"""What tensors hold, which is not always what their memory says."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch


def resolved(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose memory holds its values: a copy of a conjugate or negative view, which a bit says it is.

    Whoever reads the memory of one, as files and runtimes do, reads other numbers.
    """
    return tensor.resolve_conj().resolve_neg()


def as_array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Return what a tensor holds, wherever it is, as NumPy takes it."""
    return resolved(tensor.detach().cpu()).numpy()


def content(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor's elements in their order, whatever it is a view of and wherever it is."""
    return resolved(tensor.detach().cpu()).contiguous().flatten().view(torch.uint8).numpy().data
