"""One named array of samples, read a slice at a time, wherever it lies.

Opening a column reads its shape and dtype only.
"""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from graphopt.errors import DataError, first_line, printable
from graphopt.ir.contents import resolved
from graphopt.ir.global_state import outside_inference

_READ_ERRORS = (
    OSError, EOFError, ValueError, OverflowError, KeyError, zlib.error, zipfile.BadZipFile, NotImplementedError,
    RuntimeError, SafetensorError,
)  # fmt: skip


class Column(Protocol):
    """An array whose first axis counts samples; one without axes holds for every sample."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole array's shape."""

    @property
    def dtype_name(self) -> str:
        """The element type's name, such as `int64`."""

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return samples `start` to `stop`; the tensor may share memory with the array it came from."""


@dataclass(frozen=True)
class TensorColumn:
    """A tensor in memory."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(self.tensor.shape)

    @property
    def dtype_name(self) -> str:
        """The tensor's dtype."""
        return str(self.tensor.dtype).removeprefix("torch.")

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return a view of the samples, detached and on the CPU; a copy where it could not be trained with.

        Raises:
            DataError: there are none, on the device `meta`.
        """
        if self.tensor.is_meta:
            raise DataError("The data lie on the device `meta` and have no values. Give samples.")
        return outside_inference(resolved(part(self.tensor, start, stop).detach().cpu()))


@dataclass(frozen=True)
class ArrayColumn:
    """A NumPy array in memory, or mapped from a `.npy` file."""

    array: NDArray[Any]
    where: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self.array.shape

    @property
    def dtype_name(self) -> str:
        """The array's dtype."""
        return self.array.dtype.name

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return the samples as a tensor."""
        return to_tensor(self.array[start:stop] if self.array.shape else self.array, self.where)


@dataclass(frozen=True)
class SafetensorsColumn:
    """A tensor of a safetensors file, read by slices."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype_name: str

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return the samples."""
        with readable(f"`{printable(self.key)}` of `{self.path}`"), safe_open(self.path, "pt") as file:
            if not self.shape:
                return file.get_tensor(self.key)  # type: ignore[no-any-return]
            return file.get_slice(self.key)[start:stop]  # type: ignore[no-any-return]


def part(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Return the samples from `start` to `stop` of a tensor; one without axes holds for all."""
    return tensor[start:stop] if tensor.dim() else tensor


def to_tensor(array: NDArray[Any], where: str) -> torch.Tensor:
    """Return a NumPy array as a tensor; raises `DataError` for what no tensor holds (text, dates, objects)."""
    array = np.asarray(array)
    if array.dtype.hasobject:
        raise pickled(where)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    # Mapped files are read-only and reversed arrays have negative strides; torch takes neither.
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    try:
        return torch.from_numpy(array)
    except TypeError as err:
        raise DataError(f"{where} holds {array.dtype.name}, which is not numbers. Convert it first.") from err


def open_safetensors(path: Path) -> dict[str, Column]:
    """Return the tensors of a safetensors file by name; reads its header only."""
    columns: dict[str, Column] = {}
    with readable(f"`{path}`"), safe_open(path, "pt") as file:
        for key in sorted(file.keys()):
            lazy = file.get_slice(key)
            shape, dtype = tuple(lazy.get_shape()), str(lazy.get_dtype()).lower()
            columns[printable(key)] = SafetensorsColumn(path, key, shape, dtype)
    return columns


@contextlib.contextmanager
def readable(where: str) -> Iterator[None]:
    """Turn what reading a damaged file raises into one sentence."""
    try:
        yield
    except DataError:
        raise
    except _READ_ERRORS as err:
        raise DataError(f"Cannot read {where}: {first_line(err)}.") from err


def pickled(where: str) -> DataError:
    """Return the error for an array of Python objects."""
    return DataError(
        f"{where} holds Python objects, which only a pickle can store, and graphopt does not unpickle data. Save "
        "arrays of numbers."
    )
