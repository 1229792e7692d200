"""One named array of samples, read a slice at a time, wherever it lies.

Opening a column reads its shape and dtype only. Nothing here unpickles: `.npy` and `.npz` files are opened with
`allow_pickle=False`, and an array of Python objects is refused by its header.
"""

from __future__ import annotations

import contextlib
import math
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from numpy.lib import format as npy_format
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from graphopt.errors import DataError

# A member that claims to unpack to more than this many times its size, beyond a floor, is a zip bomb.
MAX_EXPANSION = 20_000
EXPANSION_FLOOR = 1 << 30  # bytes

_READ_ERRORS = (
    OSError, EOFError, ValueError, KeyError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError,
    SafetensorError,
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
        """Return a view of the samples, detached and on the CPU."""
        return _part(self.tensor, start, stop).detach().cpu()


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


@dataclass
class NpzColumn:
    """A member of an `.npz` file; read whole at the first use, since its compression allows no less."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype_name: str
    _loaded: torch.Tensor | None = field(default=None, repr=False)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return the samples."""
        if self._loaded is None:
            where = f"`{self.key}` of `{self.path}`"
            with readable(where), np.load(self.path, allow_pickle=False) as archive:
                self._loaded = to_tensor(archive[self.key], where)
        return _part(self._loaded, start, stop)


@dataclass(frozen=True)
class SafetensorsColumn:
    """A tensor of a safetensors file, read by slices."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype_name: str

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return the samples."""
        with readable(f"`{self.key}` of `{self.path}`"), safe_open(self.path, "pt") as file:
            if not self.shape:
                return file.get_tensor(self.key)  # type: ignore[no-any-return]
            return file.get_slice(self.key)[start:stop]  # type: ignore[no-any-return]


def _part(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
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


def open_npy(path: Path) -> ArrayColumn:
    """Map an `.npy` file."""
    with readable(f"`{path}`"):
        with path.open("rb") as file:
            _read_header(file, f"`{path}`")
        return ArrayColumn(np.load(path, mmap_mode="r", allow_pickle=False), f"`{path}`")


def open_npz(path: Path) -> dict[str, Column]:
    """Return the members of an `.npz` file by name; reads their headers only."""
    columns: dict[str, Column] = {}
    with readable(f"`{path}`"), zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            key = info.filename.removesuffix(".npy")
            where = f"`{key}` of `{path}`"
            if key == info.filename:
                continue
            if info.file_size > max(EXPANSION_FLOOR, MAX_EXPANSION * info.compress_size):
                raise DataError(f"{where} claims to unpack {info.compress_size} bytes to {info.file_size}; refused.")
            with archive.open(info) as file:
                shape, dtype = _read_header(file, where)
                body = info.file_size - file.tell()
            if math.prod(shape) * dtype.itemsize != body:
                raise DataError(f"{where} is damaged: its header says {shape} of {dtype}, its size says otherwise.")
            columns[key] = NpzColumn(path, key, shape, dtype.name)
    return columns


def open_safetensors(path: Path) -> dict[str, Column]:
    """Return the tensors of a safetensors file by name; reads its header only."""
    columns: dict[str, Column] = {}
    with readable(f"`{path}`"), safe_open(path, "pt") as file:
        for key in sorted(file.keys()):
            part = file.get_slice(key)
            columns[key] = SafetensorsColumn(path, key, tuple(part.get_shape()), str(part.get_dtype()).lower())
    return columns


@contextlib.contextmanager
def readable(where: str) -> Iterator[None]:
    """Turn what reading a damaged file raises into one sentence."""
    try:
        yield
    except DataError:
        raise
    except _READ_ERRORS as err:
        raise DataError(f"Cannot read {where}: {str(err).strip() or type(err).__name__}.") from err


def pickled(where: str) -> DataError:
    """Return the error for an array of Python objects."""
    return DataError(
        f"{where} holds Python objects, which only a pickle can store, and graphopt does not unpickle data. Save "
        "arrays of numbers."
    )


def _read_header(file: IO[bytes], where: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = npy_format.read_magic(file)
    reader = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}.get(version)
    if reader is None:
        raise DataError(f"{where} is in version {version} of the NumPy format, which holds records, not numbers.")
    shape, _, dtype = reader(file)
    if dtype.hasobject:
        raise pickled(where)
    return shape, dtype
