"""Giving memory back that is free, and is the process's all the same.

Graphs and their modules refer to each other: a program that nobody reads any more stays until Python looks for such
circles, which it does when there are many objects, however large. And the C library keeps what lies between pieces in
use: after a pass over 100 M parameters that was as much again as the weights.

Python looks at everything each time, the million objects of torch's modules too: a tenth of what exporting ResNet-50
takes. What is there when work begins is set aside.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterable, Iterator, Mapping
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
_GROWTH = 1.25  # of blocks in use, from which on all is looked at: as Python does of objects

_first: list[object] | None = None  # what was made first since objects were set aside here
_blocks = 0  # in use when all had last been looked at


@contextlib.contextmanager
def what_is_there_set_aside() -> Iterator[None]:
    """Look for dead circles only in what is made meanwhile. One thread at a time may be in here.

    Nothing is set aside where Python does not look for circles, or somebody else has set objects aside: they could not
    be told apart afterwards. So where somebody does meanwhile, all stays there.
    """
    if _first is not None or not gc.isenabled() or gc.get_freeze_count():
        yield
        return
    try:
        _set_aside()
        yield
    finally:
        take_back()


def _set_aside() -> None:
    """Set all objects aside; those that nobody reads go first, where there may be many of them."""
    global _first, _blocks
    used = sys.getallocatedblocks()
    if used > _GROWTH * _blocks:
        gc.collect()
        _blocks = used = sys.getallocatedblocks()
    _blocks = min(_blocks, used)
    gc.freeze()
    _first = []


def take_back() -> None:
    """Let Python look at everything again, unless somebody else has set objects aside since."""
    global _first
    if _first is not None and any(one is _first for one in gc.get_objects()):
        gc.unfreeze()
    _first = None


def give_back(tensors: Iterable[torch.Tensor]) -> None:
    """Let go of dead programs and return free pages, where tensors like these are very large."""
    if sum(tensor.nbytes for tensor in tensors) >= _LARGER:
        take_back()
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
