"""Where samples come from: arrays, batches, files, folders and functions, all as a sequence of chunks.

A chunk is a few columns of equal length, by name (a dict, an `.npz`) or by position (a tuple, an `.npy`).
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from graphopt.data.columns import ArrayColumn, Column, TensorColumn, open_safetensors
from graphopt.data.numpy_files import open_npy, open_npz
from graphopt.errors import DataError, cut, first_line, foreign_code, printable
from graphopt.ir.contents import content
from graphopt.ir.global_state import RandomState, random_state_kept, seeded
from graphopt.loading.functions import is_function_name, resolve_function

SUFFIXES = (".npz", ".npy", ".safetensors")
LABELS = ("labels", "label", "y", "targets", "target")
_END = object()  # of batches
_FORMS = "`.npz`, `.npy`, `.safetensors`, a folder of these, or `package.module:function`"


@dataclass(frozen=True)
class Chunk:
    """Columns of equal length.

    Attributes:
        columns: The arrays, by name; by "0", "1", ... where they have none.
        named: Whether the names mean anything.
        where: What to call the chunk in messages.
        labels: Labels that came apart from the inputs.
        is_batch: Whether it is one of the batches that are gone through.
    """

    columns: dict[str, Column]
    named: bool
    where: str
    labels: Column | None = None
    is_batch: bool = False


class Source(Protocol):
    """Chunks that can be gone through as often as needed, in a fixed order."""

    @property
    def sized(self) -> bool:
        """Whether going through the chunks reads nothing but their headers."""

    def chunks(self) -> Iterator[Chunk]:
        """Yield the chunks."""


@dataclass(frozen=True)
class FixedSource:
    """Chunks known beforehand: arrays in memory, or one file."""

    held: tuple[Chunk, ...]
    sized: bool = True

    def chunks(self) -> Iterator[Chunk]:
        """Yield the chunks."""
        yield from self.held


@dataclass(frozen=True)
class FolderSource:
    """One chunk per file of a folder, in the order of their names; one file is open at a time."""

    paths: tuple[Path, ...]
    sized: bool = True

    def chunks(self) -> Iterator[Chunk]:
        """Yield the chunks, opening one file at a time."""
        for path in self.paths:
            yield open_file(path)


class IterableSource:
    """Batches of the user's own making, in the same order each time they are gone through.

    Whatever draws random numbers for them (shuffling, augmenting) draws the same ones each time: which samples judge
    is a matter of their place.
    """

    sized = False

    def __init__(self, batches: Callable[[], Iterable[Any]], where: str) -> None:
        """Take a function that starts the batches anew."""
        self._batches = batches
        self._where = where
        self._first: str | None = None

    def chunks(self) -> Iterator[Chunk]:
        """Yield one chunk per batch.

        Raises:
            DataError: the first batch is another than before.
        """
        for number, batch in enumerate(_drawn_alike(self._batches, self._where)):
            chunk = dataclasses.replace(to_chunk(batch, f"batch {number} of {self._where}"), is_batch=True)
            if number == 0:
                self._compare(chunk)
            yield chunk

    def _compare(self, chunk: Chunk) -> None:
        digest = hashlib.sha256()
        for name, column in chunk.columns.items():
            values = column.read(0, column.shape[0] if column.shape else 1)
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
            digest.update(content(values))
        if self._first not in (None, digest.hexdigest()):
            raise DataError(
                f"The batches of {self._where} come in another order, or as other numbers, each time they are gone "
                "through, so that what judges could be what was fitted. Give them in a fixed order (shuffle=False)."
            )
        self._first = digest.hexdigest()


def _drawn_alike(batches: Callable[[], Iterable[Any]], where: str) -> Iterator[Any]:
    """Go through batches with generators of their own, which start alike each time; the caller's are left alone."""
    own = seeded(0)
    iterator: Iterator[Any] | None = None
    while True:
        with random_state_kept():
            own.restore()
            with foreign_code(lambda said, _: DataError(f"Drawing the next batch of {where} raised {said}.")):
                iterator = iter(batches()) if iterator is None else iterator
                batch = next(iterator, _END)
            own = RandomState.now()
        if batch is _END:
            return
        yield batch


class _Replay:
    """Makes a one-shot iterator re-iterable by keeping what was drawn."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator
        self._drawn: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        position = 0
        while True:
            if position == len(self._drawn):
                try:
                    self._drawn.append(next(self._iterator))
                except StopIteration:
                    return
            yield self._drawn[position]
            position += 1


def open_source(source: Any, names: Iterable[str] = ()) -> Source:
    """Return the chunks of anything a user may give as data.

    Args:
        source: See `Samples.open`.
        names: The model's inputs; a folder with one `.npy` per input is recognised by them.

    Raises:
        DataError: There is no such file, or it is of another kind.
        UsageError: There is no such function.
    """
    if isinstance(source, str | Path):
        return _open_path_or_function(source, tuple(names))
    if isinstance(source, torch.Tensor | np.ndarray | tuple | Mapping):
        return FixedSource((to_chunk(source, "the data"),))
    if callable(source) and not isinstance(source, Iterable):
        return _from_function(source, getattr(source, "__name__", "the data function"))
    if isinstance(source, Iterator) or _is_spent_once_read(source):
        replay = _Replay(iter(source))
        return IterableSource(lambda: replay, "the data")
    if isinstance(source, Iterable):
        return IterableSource(lambda: source, "the data")
    raise DataError(
        f"Data of type {type(source).__name__} is not understood. Give a tensor or array, a tuple or dict of them, "
        f"an iterable of batches, or a path: {_FORMS}."
    )


def _is_spent_once_read(source: Any) -> bool:
    """Whether an iterable hands out the same iterator each time. A data loader, which starts workers, never does."""
    if not isinstance(source, Iterable) or isinstance(source, torch.utils.data.DataLoader):
        return False
    return iter(source) is iter(source)


def to_chunk(value: Any, where: str) -> Chunk:
    """Return one batch, or all data, as a chunk; raises `DataError` where it is not arrays."""
    if isinstance(value, Mapping):
        return Chunk({str(key): _column(item, f"`{key}` of {where}") for key, item in value.items()}, True, where)
    if isinstance(value, tuple | list):
        if len(value) == 2 and isinstance(value[0], tuple | list | Mapping) and _is_array(value[1]):
            inputs = to_chunk(value[0], where)
            return Chunk(inputs.columns, inputs.named, where, _column(value[1], f"the labels of {where}"))
        columns = {str(i): _column(item, f"element {i} of {where}") for i, item in enumerate(value)}
        return Chunk(columns, False, where)
    return Chunk({"0": _column(value, where)}, False, where)


def open_file(path: Path) -> Chunk:
    """Return the columns of a data file, told apart by its contents; raises `DataError`."""
    where = f"`{path}`"
    try:
        if not path.is_file():
            raise DataError(f"{where} is no regular file, but a FIFO, a device or a broken link. Give {_FORMS}.")
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as err:
        raise DataError(f"Cannot read {where}: {err.strerror or err}.") from err
    if head.startswith(b"\x93NUMPY"):
        return Chunk({"0": open_npy(path)}, False, where)
    if head.startswith(b"PK"):
        columns = open_npz(path)
        if not columns:
            raise DataError(f"{where} is a zip archive without arrays. Write it with `numpy.savez`.")
        # What `numpy.savez(path, a, b)` calls arrays that were given no name.
        unnamed = all(re.fullmatch(r"arr_\d+", key) for key in columns)
        return Chunk(columns, not unnamed, where)
    if head[8:9] == b"{":
        return Chunk(open_safetensors(path), True, where)
    what = "is empty" if not head else "is not data that graphopt reads"
    raise DataError(f"{where} {what}. Give {_FORMS}.")


def _open_path_or_function(source: str | Path, names: tuple[str, ...]) -> Source:
    path = Path(source)
    try:
        if path.is_dir():
            return _open_folder(path, names)
        if path.exists():
            return FixedSource((open_file(path),))
        entries = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    except (OSError, ValueError) as err:  # a name too long or with a null byte, a folder that may not be read
        raise DataError(f"Cannot read `{cut(printable(str(path)), 200)}`: {first_line(err)}.") from err
    if isinstance(source, str) and is_function_name(source):
        return _from_function(resolve_function(source, "--data"), source)
    near = difflib.get_close_matches(path.name, entries, 1)
    hint = f" Did you mean `{path.parent / near[0]}`?" if near else ""
    raise DataError(f"There is no data file `{source}`.{hint}")


def _open_folder(folder: Path, names: tuple[str, ...]) -> Source:
    paths = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    odd = [path for path in paths if not path.is_file()]
    if odd:
        raise DataError(f"`{odd[0]}` is no regular file, though its name is that of data. Move it out of the folder.")
    if not paths:
        raise DataError(f"The folder `{folder}` holds no {', '.join(SUFFIXES)} file.")
    arrays = {path.stem: path for path in paths if path.suffix == ".npy"}
    if len(arrays) == len(paths) and len(paths) > 1 and any(name in arrays for name in names):
        columns: dict[str, Column] = {stem: open_npy(path) for stem, path in arrays.items()}
        return FixedSource((Chunk(columns, True, f"the folder `{folder}`"),))
    return FolderSource(tuple(paths))


def _from_function(function: Callable[[], Any], where: str) -> Source:
    """Call a function once to see what it makes: data, or batches (then it is called for each pass over them)."""
    made = _call(function, where)
    if not isinstance(made, Iterator):
        return open_source(made)
    first: list[Any] = [made]

    def batches() -> Iterable[Any]:
        batches: Iterable[Any] = first.pop() if first else _call(function, where)
        return batches

    return IterableSource(batches, f"`{where}`")


def _call(function: Callable[[], Any], where: str) -> Any:
    with foreign_code(
        lambda said, _: DataError(
            f"The data function `{where}` raised {said}. It is called without arguments and must yield batches."
        )
    ):
        return function()


def _is_array(value: Any) -> bool:
    return isinstance(value, torch.Tensor | np.ndarray)


def _column(value: Any, where: str) -> Column:
    if isinstance(value, torch.Tensor):
        return TensorColumn(value)
    if isinstance(value, np.ndarray):
        return ArrayColumn(value, where)
    advice = ""
    if isinstance(value, Mapping | tuple | list):
        advice = " A model with nested inputs is captured first (graphopt.capture); its data is given by flat names."
    raise DataError(f"{where} is a {type(value).__name__}, not a tensor or an array.{advice}")
