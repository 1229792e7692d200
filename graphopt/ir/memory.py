"""Giving memory back that is free, and is the process's all the same.

Graphs and their modules refer to each other: a program that nobody reads any more stays until Python looks for such
circles, which it does when there are many objects, however large. And the C library keeps what lies between pieces in
use: after a pass over 100 M parameters that was as much again as the weights.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterable

import torch

LARGE = 1 << 26  # bytes; to look for circles takes a third of a second
_MANY = 1 << 20  # numbers; to return pages takes some milliseconds


def give_back(tensors: Iterable[torch.Tensor]) -> None:
    """Let go of dead programs and return free pages, where tensors like these are large."""
    if sum(tensor.nbytes for tensor in tensors) >= LARGE:
        gc.collect()
        trim(_MANY)


def trim(numbers: int) -> None:
    """Return free pages to the system, where matrices of as many numbers come and go; only glibc has to be told."""
    returned = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if numbers >= _MANY and returned is not None:
        returned(0)
