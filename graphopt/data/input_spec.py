"""What a model's input looks like, as a user writes it: `name=1x3x224x224:float32`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from graphopt.errors import UsageError

_DTYPE_NAMES = "float32 float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool"
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _DTYPE_NAMES.split()}
_FORM = "name=1x3x224x224:float32"


class Spec(Protocol):
    """What data is checked against; `InputSpec` and a program's own specs have it."""

    @property
    def name(self) -> str:
        """The input's name."""

    @property
    def shape(self) -> Sequence[int | str | None]:
        """Sizes; a dynamic axis is None or a name, and equal names are equal sizes."""

    @property
    def dtype(self) -> torch.dtype:
        """The element type the model takes."""


@dataclass(frozen=True, slots=True)
class InputSpec:
    """Name, shape and dtype of one input; the first axis counts samples.

    >>> parse_input_spec("x=1x3x32x32:float32")
    InputSpec(name='x', shape=(1, 3, 32, 32), dtype=torch.float32)
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


def parse_input_spec(text: str) -> InputSpec:
    """Parse `name=1x3x224x224:float32`; the dtype is float32 where it is left out.

    Raises:
        UsageError: The text has another form, a size is not positive, or the dtype is unknown.
    """
    name, equals, rest = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"--input {text!r} does not name the input. Write it as `{_FORM}`.")
    sizes, colon, dtype_name = rest.partition(":")
    if colon and dtype_name.strip() not in _DTYPES:
        near = difflib.get_close_matches(dtype_name.strip(), list(_DTYPES), 1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise UsageError(f"--input {text!r}: unknown dtype {dtype_name!r}.{hint} Known: {_DTYPE_NAMES}.")
    parts = re.split(r"[x×]", sizes.strip())
    if not all(re.fullmatch(r"\d{1,12}", part.strip(), re.ASCII) for part in parts):
        raise UsageError(f"--input {text!r}: {sizes!r} is not a shape. Write sizes with x between: `{_FORM}`.")
    shape = tuple(int(part) for part in parts)
    if 0 in shape:
        raise UsageError(f"--input {text!r}: a size of 0 leaves nothing to run. Write it as `{_FORM}`.")
    return InputSpec(name.strip(), shape, _DTYPES[dtype_name.strip()] if colon else torch.float32)
