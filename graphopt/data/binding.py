"""Which column feeds which input, and which one holds the labels."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graphopt.data.columns import Column
from graphopt.data.sources import LABELS, Chunk
from graphopt.errors import DataError

_MOST_HOLLOW = 1 << 20  # samples that hold no value


@dataclass(frozen=True)
class Bound:
    """A chunk, matched to a model's inputs.

    Attributes:
        names: The inputs that the data has, in the model's order.
        inputs: Their columns.
        labels: The labels, if there are any.
        count: How many samples the chunk holds.
        where: What to call the chunk in messages.
        is_batch: Whether the chunk is one of the batches that are gone through.
        note: What was left aside, for the user.
    """

    names: tuple[str, ...]
    inputs: tuple[Column, ...]
    labels: Column | None
    count: int
    where: str
    is_batch: bool
    note: str | None = None


def bind(chunk: Chunk, names: Sequence[str] | None, required: int | None) -> Bound:
    """Match a chunk's columns to a model's inputs.

    Args:
        chunk: By name or by position.
        names: The model's inputs in order; None to take the data's own, in its order.
        required: How many of `names`, from the first, must be given; None where that is not known.

    Raises:
        DataError: Names do not match, there are too few or too many arrays, or their lengths differ.
    """
    chosen, labels, note = _by_name(chunk, names) if chunk.named else _by_position(chunk, names, required)
    if required is not None and names is not None:
        missing = [name for name in names[:required] if name not in chosen]
        if missing:
            raise DataError(f"{_capital(chunk.where)} lacks the model's input {_list(missing)}; it has {_has(chunk)}.")
    inputs = tuple(chosen.values())
    count = _common_length(chunk, chosen, labels)
    return Bound(tuple(chosen), inputs, labels, count, chunk.where, chunk.is_batch, note)


def _by_name(chunk: Chunk, names: Sequence[str] | None) -> tuple[dict[str, Column], Column | None, str | None]:
    columns = chunk.columns
    label = next((key for key in LABELS if key in columns and key not in (names or ())), None)
    labels = chunk.labels if chunk.labels is not None or label is None else columns[label]
    spare = [key for key in columns if key not in (names or ()) and (key != label or chunk.labels is not None)]
    if names is None:
        return {key: columns[key] for key in spare}, labels, None
    chosen = {name: columns[name] for name in names if name in columns}
    missing = [name for name in names if name not in columns]
    slips = {key: near[0] for key in spare if (near := difflib.get_close_matches(key, missing, 1, 0.75))}
    if not chosen or slips:
        hint = " ".join(f"Did you mean `{name}` by `{key}`?" for key, name in slips.items())
        raise DataError(
            f"{_capital(chunk.where)} has {_has(chunk)}, but the model's inputs are {_list(names)}. "
            f"{hint or 'Rename the arrays to the inputs they are for.'}"
        )
    note = f"{_list(spare)} of the data is not an input of the model and was left aside" if spare else None
    return chosen, labels, note


def _by_position(
    chunk: Chunk, names: Sequence[str] | None, required: int | None
) -> tuple[dict[str, Column], Column | None, str | None]:
    columns = list(chunk.columns.values())
    labels = chunk.labels
    note = None
    spare_last = labels is None and len(columns) > 1
    if names is None:
        takes_last = spare_last and _looks_like_labels(columns)
        names = [str(i) for i in range(len(columns) - takes_last)]
    else:
        optional = required is not None and required < len(columns) <= len(names)
        takes_last = spare_last and (len(columns) == len(names) + 1 or (optional and _looks_like_labels(columns)))
    if takes_last:
        labels = columns.pop()
        note = "the element after the inputs was taken as labels"
    if not columns or len(columns) > len(names):
        raise DataError(
            f"{_capital(chunk.where)} has {len(chunk.columns)} arrays for the model's {len(names)} inputs "
            f"({_list(names)}). Give one array per input, in this order, or a dict by name."
        )
    return dict(zip(names, columns, strict=False)), labels, note


def _looks_like_labels(columns: Sequence[Column]) -> bool:
    """Tell whether the last column is one class number per sample, beside inputs that are more than that."""
    last = columns[-1]
    return len(last.shape) == 1 and last.dtype_name.startswith(("int", "uint")) and len(columns[0].shape) > 1


def _common_length(chunk: Chunk, inputs: Mapping[str, Column], labels: Column | None) -> int:
    columns = [*inputs.items(), *([("labels", labels)] if labels is not None else [])]
    if not columns:
        raise DataError(f"{_capital(chunk.where)} holds no arrays.")
    lengths = {name: column.shape[0] for name, column in columns if column.shape}
    if not lengths or (labels is not None and not labels.shape):
        flat = [name for name, column in columns if not column.shape]
        raise DataError(f"{_list(flat)} of {chunk.where} is a single number; the first axis must count samples.")
    hollow = [name for name, column in columns if column.shape[:1] > (_MOST_HOLLOW,) and 0 in column.shape]
    if hollow:  # nothing in the file bounds how many there are
        raise DataError(
            f"{_list(hollow)} of {chunk.where} claims {lengths[hollow[0]]:,} samples without a single value."
        )
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"`{name}` {length}" for name, length in lengths.items())
        raise DataError(f"The arrays of {chunk.where} hold different numbers of samples: {listed}.")
    return next(iter(lengths.values()))


def _has(chunk: Chunk) -> str:
    return _list(list(chunk.columns)) if chunk.named else f"{len(chunk.columns)} unnamed arrays"


def _list(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
