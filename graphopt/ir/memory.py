"""Giving memory back that is free, and is the process's all the same.

Graphs and their modules refer to each other: a program that nobody reads any more stays until Python looks for such
circles, which it does when there are many objects, however large. And the C library keeps what lies between pieces in
use: after a pass over 100 M parameters that was as much again as the weights.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from graphopt.errors import UsageError
from graphopt.files import ScratchDirectory

LARGE = 1 << 26  # bytes
_LARGER = 1 << 28  # bytes; to look for circles takes a third of a second, and a step of ResNet-50 one or two
_KINDS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8)  # of weights
_MANY = 1 << 20  # numbers; to return pages takes some milliseconds


def give_back(tensors: Iterable[torch.Tensor]) -> None:
    """Let go of dead programs and return free pages, where tensors like these are very large."""
    if sum(tensor.nbytes for tensor in tensors) >= _LARGER:
        gc.collect()
        trim(_MANY)


def trim(numbers: int) -> None:
    """Return free pages to the system, where matrices of as many numbers come and go; only glibc has to be told."""
    returned = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if numbers >= _MANY and returned is not None:
        returned(0)


def mapped(tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Return large tensors as copies that lie in a temporary file, whose name is gone, until somebody reads them.

    Small ones are returned themselves, and all where there is no room for that file.
    """
    kept = {n: t for n, t in tensors.items() if t.dtype in _KINDS and t.device.type == "cpu" and t.numel()}
    if sum(tensor.nbytes for tensor in kept.values()) < LARGE:
        return tensors
    with contextlib.suppress(SafetensorError, RuntimeError, UsageError), ScratchDirectory() as folder:
        path = Path(folder) / "tensors"
        save_file({name: tensor.detach().contiguous() for name, tensor in kept.items()}, path)
        return {**tensors, **load_file(path)}
    return tensors
