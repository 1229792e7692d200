"""Cleaners for JSON from strangers: each returns a clean copy of a value, or raises.

Leaves first (text, names, numbers), then the combinators that make cleaners of objects and lists. A cleaner
raises `HostileError` for what could be run and `DamagedError` for what is merely wrong.
"""

from __future__ import annotations

import json
import keyword
import unicodedata
from collections.abc import Callable
from typing import Any, NoReturn

from graphopt.errors import cut
from graphopt.loading.expressions import check_expression
from graphopt.loading.operators import check_operator
from graphopt.loading.refusal import DamagedError, HostileError

Clean = Callable[[Any], Any]


def text(value: Any) -> str:
    """Return any text; it is data to torch."""
    if not isinstance(value, str):
        raise DamagedError(f"its program holds {shown(value)} where text is expected")
    return value


# What the source of a graph module means by these names.
_TAKEN = frozenset({"self", "torch", "pytree", "fx_pytree"})


def name(value: Any) -> str:
    """Return the name of a value: an identifier, because it is pasted into Python source."""
    if _identifier(value) in _TAKEN:
        raise _no_name(value)
    return str(value)


def optional_name(value: Any) -> str:
    """Return the name of an operator's argument, or the empty text that torch writes for none."""
    return "" if value == "" else _identifier(value)


def _identifier(value: Any) -> str:
    # Python reads other writings of a letter as the letter itself
    plain = isinstance(value, str) and value.isidentifier() and value == unicodedata.normalize("NFKC", value)
    if not plain or keyword.iskeyword(value):
        raise _no_name(value)
    return str(value)


def _no_name(value: Any) -> HostileError:
    return HostileError(f"a value in it is called {shown(value)}, which could be run as source")


def path(value: Any) -> str:
    """Return a dotted name of a parameter, buffer or module; it is pasted between quotes into source."""
    if not isinstance(value, str) or not value.isprintable() or any(char in "'\"\\" for char in value):
        raise HostileError(f"a tensor in it is called {shown(value)}, which could be run as source")
    return value


def integer(value: Any) -> int:
    """Return an integer of at most 64 bits."""
    if type(value) is not int or abs(value) >= 2**63:
        raise DamagedError(f"its program holds {shown(value)} where an integer is expected")
    return value


def boolean(value: Any) -> bool:
    """Return a truth value."""
    if type(value) is not bool:
        raise DamagedError(f"its program holds {shown(value)} where true or false is expected")
    return value


def number(value: Any) -> float | int | str:
    """Return a float, as JSON or as one of the three texts torch writes for what JSON lacks."""
    if type(value) not in (int, float) and value not in ("Infinity", "-Infinity", "NaN"):
        raise DamagedError(f"its program holds {shown(value)} where a number is expected")
    return value  # type: ignore[no-any-return]


def expression(value: Any) -> str:
    """Return the text of a size expression that sympy may evaluate."""
    check_expression(text(value))
    return text(value)


def operator(value: Any) -> str:
    """Return the name of an allow-listed operator."""
    check_operator(text(value))
    return text(value)


def no_operator(value: Any) -> NoReturn:
    """Refuse an operator as an argument: a higher-order one would call it past every check of calls."""
    raise HostileError(f"it hands {shown(value)} to another operator to call, which programs of torch.export do not do")


def on_the_cpu(value: Any) -> str:
    """Return `cpu` for any type of device: as with pickles, what lay on an accelerator is read to the CPU."""
    text(value)
    return "cpu"


def json_text(value: Any) -> str:
    """Return text that is JSON: notes that passes leave on nodes."""
    try:
        json.loads(text(value))
    except (ValueError, RecursionError) as err:
        raise DamagedError("the notes on one of its nodes are not JSON") from err
    return text(value)


def shown(value: Any) -> str:
    """Return a value as a message shows it, cut to 80 characters."""
    return cut(repr(value), 80)


def record(required: dict[str, Clean], optional: dict[str, Clean] | None = None) -> Clean:
    """Make the cleaner of an object with these fields; other fields are dropped."""

    def clean(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise DamagedError(f"its program holds {shown(value)} where an object is expected")
        missing = [key for key in required if key not in value]
        if missing:
            raise DamagedError(f"its program lacks the field `{missing[0]}`")
        result = {key: field(value[key]) for key, field in required.items()}
        result.update({key: field(value[key]) for key, field in (optional or {}).items() if key in value})
        return result

    return clean


def union(variants: dict[str, Clean]) -> Clean:
    """Make the cleaner of an object with exactly one of these fields."""

    def clean(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or len(value) != 1:
            raise DamagedError(f"its program holds {shown(value)} where one tagged value is expected")
        (tag,) = value
        if tag in ("as_custom_obj", "custom_obj"):
            raise HostileError("it holds a custom object, which only a pickle can rebuild")
        if tag not in variants:
            raise DamagedError(f"its program holds a value of the unknown kind {shown(tag)}")
        return {tag: variants[tag](value[tag])}

    return clean


def array(item: Clean) -> Clean:
    """Make the cleaner of a list."""

    def clean(value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise DamagedError(f"its program holds {shown(value)} where a list is expected")
        return [item(entry) for entry in value]

    return clean


def mapping(key: Clean, item: Clean) -> Clean:
    """Make the cleaner of an object with free keys."""

    def clean(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise DamagedError(f"its program holds {shown(value)} where an object is expected")
        return {key(name): item(entry) for name, entry in value.items()}

    return clean


def nullable(item: Clean) -> Clean:
    """Make the cleaner of a value or null."""
    return lambda value: None if value is None else item(value)


def empty(value: Any) -> dict[str, Any]:
    """Return the empty object: no custom objects."""
    if value != {}:
        raise HostileError("it holds custom objects, which only a pickle can rebuild")
    return {}
