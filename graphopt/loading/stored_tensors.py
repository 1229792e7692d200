"""The bytes of tensors in a `torch.save` file: members of a zip archive, or behind the pickle in the older format."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from typing import Any

import torch

from graphopt.loading.archive import Archive
from graphopt.loading.contents import is_legacy_torch
from graphopt.loading.pickle_records import Global, read_records
from graphopt.loading.refusal import DamagedError, HostileError

MAX_PICKLE = 2**28  # bytes of the pickle beside the tensors
MAX_REPEATED = 2**26  # elements, together, of the tensors of a file that repeat the few they have by strides of zero
_NAME = re.compile(r"\w{1,40}", re.ASCII)
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
_UNTYPED = "torch.storage.UntypedStorage"


class StoredTensors:
    """The stored bytes of a file, by name; each is read once, and tensors of one storage share it.

    Args:
        read: returns the bytes of a name; raises `DamagedError` where they are missing.
    """

    def __init__(self, read: Callable[[str], bytes]) -> None:
        self._read = read
        self._bytes: dict[str, torch.Tensor] = {}
        self._truths: set[str] = set()
        self._repeated = 0

    def tensor(
        self,
        key: tuple[Any, ...],
        dtype: torch.dtype | None,
        offset: int,
        size: tuple[Any, ...],
        stride: tuple[Any, ...],
    ) -> torch.Tensor:
        """Return a view of stored bytes.

        Args:
            key: the persistent id: "storage", its class, its name, its device, its number of elements.
            dtype: of the elements where the storage says none.
            offset: of the first element.
            size: of each axis.
            stride: of each axis, in elements.

        Raises:
            DamagedError: the bytes are missing, or the view reaches beyond them.
            HostileError: the key asks for something other than bytes.
        """
        name, stored, length = _parts(key)
        dtype = dtype or stored
        if not isinstance(dtype, torch.dtype):
            raise DamagedError("it holds a tensor without its type")
        if name not in self._bytes:
            found = bytearray(self._read(name))
            self._bytes[name] = torch.frombuffer(found, dtype=torch.uint8) if found else torch.empty(0).byte()
        raw = self._bytes[name]
        if len(raw) != length or length % dtype.itemsize:
            raise DamagedError(f"the bytes of its tensor `{name}` are {len(raw)}, not the {length} it says")
        if dtype is torch.bool and name not in self._truths:  # once: a file may have any number of views of it
            if bool((raw > 1).any()):
                raise DamagedError(f"its tensor `{name}` of truth values holds others")
            self._truths.add(name)
        _check_view(name, length // dtype.itemsize, offset, size, stride)
        elements = math.prod(size)
        self._repeated += elements if elements > length // dtype.itemsize else 0
        if self._repeated > MAX_REPEATED:
            raise HostileError(f"its tensors repeat the few elements they have to {self._repeated}")
        return raw.view(dtype).as_strided(size, stride, offset)


def read_torch_file(data: bytes) -> tuple[Any, StoredTensors]:
    """Return the records of a file's value, and where its tensors' bytes are.

    Raises:
        DamagedError: it is in neither of the formats of `torch.save`, or cut off.
        HostileError: its pickle asks for what no model needs.
    """
    if is_legacy_torch(data):
        return _read_legacy(data)
    archive = Archive(data)
    if "byteorder" in archive and archive.read("byteorder") != b"little":
        raise DamagedError("its tensors are stored in big-endian order")
    if "data.pkl" in archive and archive.size("data.pkl") > MAX_PICKLE:
        raise HostileError(f"its pickle takes {archive.size('data.pkl')} bytes, more than any model's")
    value, _ = read_records(io.BytesIO(archive.read("data.pkl")))
    return value, StoredTensors(lambda name: archive.read(f"data/{name}"))


def _read_legacy(data: bytes) -> tuple[Any, StoredTensors]:
    """Read pickles one behind the other, and behind the last the bytes: a count of elements, then the elements."""
    stream = io.BytesIO(data)
    for _ in range(3):  # the magic number, the protocol, the sizes of integers
        read_records(stream)
    value, outside = read_records(stream)
    names, _ = read_records(stream)
    lengths = {name: length for name, _, length in map(_parts, (stored.key for stored in outside))}
    if not isinstance(names, list) or not all(isinstance(name, str) and name in lengths for name in names):
        raise DamagedError("it does not say which bytes belong to which tensor")
    spans: dict[str, tuple[int, int]] = {}
    position = stream.tell()
    for name in names:
        spans[name] = (position + 8, position + 8 + lengths[name])
        position = spans[name][1]

    def read(name: str) -> bytes:
        if name not in spans:
            raise DamagedError(f"the bytes of its tensor `{name}` are missing")
        return data[slice(*spans[name])]

    return value, StoredTensors(read)


def _parts(key: tuple[Any, ...]) -> tuple[str, torch.dtype | None, int]:
    """Return the name of a storage, the type of its elements if it has one, and how many bytes it has."""
    match key:
        case ("storage", Global(name=kind), str(name), str(), int(count), *view) if _NAME.fullmatch(name):
            dtype = _STORAGES.get(kind.removeprefix("torch."))
            if 0 <= count < 2**48 and (dtype is not None or kind == _UNTYPED) and view in ([], [None]):
                return name, dtype, count * (dtype or torch.uint8).itemsize
    raise HostileError("its pickle asks for something other than the bytes of a tensor")


def _check_view(name: str, count: int, offset: int, size: tuple[Any, ...], stride: tuple[Any, ...]) -> None:
    numbers = (offset, *size, *stride)
    good = len(size) == len(stride) and all(type(number) is int and 0 <= number < 2**48 for number in numbers)
    if good and 0 not in size:
        good = offset + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True)) < count
    if not good:
        raise DamagedError(f"its tensor `{name}` reaches beyond the {count} elements that are stored")
