"""`.npy` and `.npz` files: a header is checked before it is believed, a member unpacked as far as it is read.

Nothing here unpickles: an array of Python objects is refused by its header.
"""

from __future__ import annotations

import io
import math
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy_format

from graphopt.data.columns import ArrayColumn, Column, part, pickled, readable, to_tensor
from graphopt.errors import DataError, cut, first_line, printable

_LONGEST_HEADER = 10_000  # bytes; NumPy evaluates no longer one either
_MOST_AXES = 64  # of an array of NumPy's
_READERS = {
    (1, 0): npy_format.read_array_header_1_0,
    (2, 0): npy_format.read_array_header_2_0,
    (3, 0): npy_format.read_array_header_2_0,  # differs in the names of a record's fields, and no record is read
}

# What numpy.savez writes. LZMA would allocate up to 4 GB for its dictionary, as the file says.
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_CHUNK = 1 << 24  # bytes unpacked at once
# A member is kept unpacked up to this size, or this many times its size in the file, and read anew each time beyond.
_KEPT_BYTES, _KEPT_EXPANSION = 1 << 28, 4
# Deflate packs zeros 1032 to 1, so that a file of 300 kB is 300 MB of padding, or a trap: no more of it at once.
_READ_BYTES, _READ_EXPANSION = 1 << 29, 16


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of an array says, checked against the bytes behind it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    column_major: bool
    offset: int  # of the first value, bytes from the start of the file or member

    @property
    def row(self) -> int:
        """Bytes of one sample; of the whole array where it has no axes."""
        return self.dtype.itemsize * math.prod(self.shape[1:])


@dataclass(eq=False)
class NpzColumn:
    """A member of an `.npz` file, kept unpacked where it is small and otherwise unpacked as far as it is read."""

    path: Path
    member: str
    packed: int  # bytes in the file
    header: Header
    _kept: torch.Tensor | None = field(default=None, repr=False)
    _stream: IO[bytes] | None = field(default=None, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self.header.shape

    @property
    def dtype_name(self) -> str:
        """The array's dtype."""
        return self.header.dtype.name

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return the samples.

        Raises:
            DataError: the member is damaged, or unpacks to far more than it is in the file.
        """
        count = self.shape[0] if self.shape else 1
        kept = not self.shape or count * self.header.row <= max(_KEPT_BYTES, _KEPT_EXPANSION * self.packed)
        if not kept:
            return self._rows(start, min(stop, count))
        if self._kept is None:
            self._kept, self._stream = self._rows(0, count), None
        return part(self._kept, start, stop)

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        if self.header.column_major and stop - start < self.shape[0]:
            raise DataError(
                f"{self._where} is stored column by column, so that one sample means unpacking all. Save it with "
                "`numpy.ascontiguousarray`."
            )
        size = (stop - start) * self.header.row
        if size > max(_READ_BYTES, _READ_EXPANSION * self.packed):
            raise DataError(
                f"{stop - start} samples of {self._where} unpack to {size:,} bytes, all of it to {self.packed:,} in "
                "the file. Save it with `numpy.savez`, which packs nothing, if it is meant so."
            )
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        order: Any = "F" if self.header.column_major else "C"
        with readable(self._where):
            buffer = self._unpacked(self.header.offset + start * self.header.row, size)
            return to_tensor(np.ndarray(shape, self.header.dtype, buffer, order=order), self._where)

    def _unpacked(self, start: int, size: int) -> bytearray:
        if self._stream is None:
            with zipfile.ZipFile(self.path) as archive:
                self._stream = archive.open(self.member)
        self._stream.seek(start)
        buffer, done = bytearray(size), 0
        with memoryview(buffer) as view:
            while done < size:
                read = self._stream.readinto(view[done : done + _CHUNK])  # type: ignore[attr-defined]
                if not read:
                    raise DataError(f"{self._where} is damaged: it ends before the {size:,} bytes its header says.")
                done += read
        return buffer

    @property
    def _where(self) -> str:
        return _named(self.member, self.path)


def open_npy(path: Path) -> ArrayColumn:
    """Map an `.npy` file."""
    where = f"`{path}`"
    with readable(where):
        size = path.stat().st_size
        with path.open("rb") as file:
            found = _read_header(file, where)
        if found.offset + math.prod(found.shape) * found.dtype.itemsize > size:
            raise _contradiction(where, found)
        order: Any = "F" if found.column_major else "C"
        return ArrayColumn(np.memmap(path, found.dtype, "r", found.offset, found.shape, order), where)


def open_npz(path: Path) -> dict[str, Column]:
    """Return the members of an `.npz` file by name; reads their headers only."""
    columns: dict[str, Column] = {}
    with readable(f"`{path}`"), zipfile.ZipFile(path) as archive:
        size = path.stat().st_size
        for info in archive.infolist():
            if not info.filename.endswith(".npy"):
                continue
            key, where = printable(info.filename.removesuffix(".npy")), _named(info.filename, path)
            if key in columns:
                raise DataError(f"`{path}` holds two arrays called `{key}`. Write it with `numpy.savez`.")
            if info.compress_type not in _COMPRESSIONS or info.compress_size > size:
                raise DataError(f"{where} is packed as `numpy.savez` never does. Write it with that.")
            with archive.open(info) as file:
                found = _read_header(file, where)
            if found.offset + math.prod(found.shape) * found.dtype.itemsize != info.file_size:
                raise _contradiction(where, found)
            columns[key] = NpzColumn(path, info.filename, info.compress_size, found)
    return columns


def _read_header(file: IO[bytes], where: str) -> Header:
    head = io.BytesIO(file.read(_LONGEST_HEADER))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how the text is written
            version = npy_format.read_magic(head)
            if version not in _READERS:
                raise DataError(f"{where} is in version {version} of the NumPy format. Write it with `numpy.save`.")
            shape, column_major, dtype = _READERS[version](head)
    except DataError:
        raise
    except Exception as err:  # it evaluates text of the file and makes a type of it
        raise DataError(f"{where} is damaged: its header cannot be read ({first_line(err)}).") from err
    if dtype.hasobject:
        raise pickled(where)
    odd = len(shape) > _MOST_AXES or any(type(size) is not int or size < 0 for size in shape)
    if odd or dtype.subdtype is not None:
        raise DataError(f"{where} is damaged: its header says it is {cut(str(shape), 80)} of {cut(str(dtype), 80)}.")
    return Header(shape, dtype, column_major, head.tell())


def _contradiction(where: str, found: Header) -> DataError:
    said = f"{cut(str(found.shape), 80)} of {cut(str(found.dtype), 80)}"
    return DataError(f"{where} is damaged: its header says {said}, its size says otherwise.")


def _named(member: str, path: Path) -> str:
    return f"`{printable(member.removesuffix('.npy'))}` of `{path}`"
