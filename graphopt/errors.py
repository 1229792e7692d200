"""The errors graphopt raises on purpose, each with the exit code its command ends with.

A message has four parts: what failed, where (pass, node, line of the user's model), what was expected and
found, and what to try. Anything else that reaches the user is a bug in graphopt.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from pydantic import ValidationError


class GraphOptError(Exception):
    """Base of every error that graphopt raises on purpose."""

    exit_code: ClassVar[int] = 4


class GateError(GraphOptError):
    """A `--fail-if` gate that failed; the results lie in DIR.failed."""

    exit_code = 1


class UsageError(GraphOptError):
    """An argument, option or pipeline text that cannot be understood."""

    exit_code = 2


class CaptureError(GraphOptError):
    """A model that could not be turned into a program."""

    exit_code = 3


class ExampleError(CaptureError):
    """A model that fails on its example inputs, before anything is traced.

    Attributes:
        reason: what the model raised, on one line.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class LoadError(CaptureError):
    """A model file that is missing, damaged, of another kind, or not trusted."""


class PassError(GraphOptError):
    """A pass that could not plan or apply its rewrite."""

    exit_code = 4


class VerifyError(GraphOptError):
    """A program that no longer means what it should."""

    exit_code = 4


class LoweringError(GraphOptError):
    """A program that a backend could not lower, or an artifact that its runtime refused or ran wrongly."""

    exit_code = 5


class DataError(GraphOptError):
    """Calibration or evaluation data that does not fit the model."""

    exit_code = 6


def first_line(err: BaseException) -> str:
    """Return the first line of an error's text, without a full stop; as much of it as a sentence can hold."""
    line = next((line.strip() for line in str(err).splitlines() if line.strip()), type(err).__name__)
    return cut(line.rstrip("."))


def cut(text: str, most: int = 300) -> str:
    """Return the start of a text, `...` in the place of what is longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def printable(text: str) -> str:
    """Return text of a stranger with what a terminal would obey, and what no file could be named, spelled out."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


@dataclass(frozen=True)
class Problem:
    """Where data is first not what it must be, and what is the matter: "`plans.0.target`: field required".

    Attributes:
        path: the names that lead there; none where all of it is at fault.
        said: what is the matter, as the end of a sentence.
    """

    path: tuple[str, ...]
    said: str

    def __str__(self) -> str:
        return f"`{cut('.'.join(self.path) or 'it', 80)}`: {self.said}"


def first_problem(err: ValidationError) -> Problem:
    """Put the first thing that pydantic finds in data into our words."""
    first = err.errors()[0]
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        said = "a field it does not know"
    elif first["type"] == "value_error":  # one of our own validators, whose sentence it is
        said = first["msg"].removeprefix("Value error, ").rstrip(".")
    else:
        said = f"{first['msg'][:1].lower()}{first['msg'][1:]}"
    return Problem(tuple(printable(str(name)) for name in first["loc"]), cut(said))


_PASSED_ON = ("KeyboardInterrupt", "OutOfMemoryError")  # the second is torch's, which is not imported here


@contextlib.contextmanager
def foreign_code(failed: Callable[[str, BaseException], Exception]) -> Iterator[None]:
    """Turn whatever a stranger's code raises, `SystemExit` too, into an error of ours.

    Our own errors, ^C and a lack of memory, a device's too, pass as they are.

    Args:
        failed: makes the error of what was raised, `ValueError: its first line`, and of the exception itself.
    """
    try:
        yield
    except BaseException as err:
        if isinstance(err, GraphOptError | MemoryError) or type(err).__name__ in _PASSED_ON:
            raise
        said = first_line(err)
        raise failed(printable(f"{type(err).__name__}: {said}" if str(err) else said), err) from err


def line_of(err: BaseException, module: str) -> str:
    """Return `file:line` of the innermost call in a module that led to an error, "" where none did."""
    found = [
        f"{frame.f_code.co_filename}:{number}"
        for frame, number in traceback.walk_tb(err.__traceback__)
        if frame.f_globals.get("__name__") == module
    ]
    return found[-1] if found else ""
