"""Typed options of a pass: from text or data to a validated frozen dataclass, and back.

Text values are what a shell needs no quoting for: `ratio=0.5`, `criterion=taylor`, `skip=head+layer1.*`
(several values joined by `+`), `rank=none`.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import pydantic

from graphopt.errors import UsageError, cut, first_problem, printable
from graphopt.ir.plain_data import Json

_FINEST = 10**9  # denominator of a share


def build(pass_name: str, options_type: type[Any], given: Mapping[str, Any]) -> Any:
    """Validate `given` and return an instance of `options_type`.

    Args:
        pass_name: for messages.
        options_type: a frozen dataclass.
        given: field name to value; strings are read as pipeline text.

    Raises:
        UsageError: an unknown option or a value of the wrong type or range; names both and what is allowed.
    """
    known = [item.name for item in dataclasses.fields(options_type)]
    hints = _hints(options_type)
    for name in given:
        if name not in known:
            raise UsageError(
                f"Pass `{pass_name}` has no option `{cut(printable(name), 80)}`{nearest(name, known)} "
                f"Its options: {', '.join(known) or 'none'}. See `graphopt passes show {pass_name}`."
            )
    values = {name: _from_text(value, hints[name]) for name, value in given.items()}
    try:
        return _adapter(options_type).validate_python(values)
    except pydantic.ValidationError as err:
        problem = first_problem(err)
        at_fault = {name: value for name, value in given.items() if name in problem.path[:1]} or given
        what = cut(printable(", ".join(f"`{name}={value}`" for name, value in at_fault.items())))
        raise UsageError(
            f"Pass `{pass_name}` cannot take {what}: {problem.said}. See `graphopt passes show {pass_name}`."
        ) from err


def changed(options: Any) -> dict[str, Json]:
    """Return the fields of `options` that differ from their defaults, as plain data."""
    default = type(options)()
    return {
        item.name: plain(getattr(options, item.name))
        for item in dataclasses.fields(options)
        if getattr(options, item.name) != getattr(default, item.name)
    }


def plain(value: Any) -> Json:
    """Return an option value as JSON data."""
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def to_text(value: Any) -> str:
    """Return an option value as pipeline text; `build` reads it back."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return "+".join(to_text(item) for item in value)
    return str(value)


def describe(options_type: type[Any]) -> list[tuple[str, str, str, str]]:
    """Return (name, type, default, allowed) of every option, for help."""
    schema = _adapter(options_type).json_schema()["properties"]
    default = options_type()
    rows = []
    for item in dataclasses.fields(options_type):
        rows.append(
            (
                item.name,
                _type_text(schema[item.name]),
                to_text(getattr(default, item.name)),
                _range_text(schema[item.name]),
            )
        )
    return rows


def exact(share: float | Fraction) -> Fraction:
    """Return the share that was meant: of 100 indices 0.29 is 29 and 1 / 6 of 12 is 2, whatever their binary form."""
    return share if isinstance(share, Fraction) else Fraction(share).limit_denominator(_FINEST)


def nearest(word: str, known: list[str]) -> str:
    """Return "; did you mean `prune`?" for the nearest known word, or "."."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean `{close[0]}`?" if close else "."


def _adapter(options_type: type[Any]) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(options_type)


def _hints(options_type: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(options_type)


def _from_text(value: Any, hint: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.lower() == "none" and type(None) in typing.get_args(hint):
        return None
    if _is_tuple(hint):
        return tuple(value.split("+")) if value else ()
    return value


def _is_tuple(hint: Any) -> bool:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return any(typing.get_origin(option) is tuple for option in options)


def _type_text(schema: Mapping[str, Any]) -> str:
    options = schema.get("anyOf", [schema])
    kinds = (str(option.get("type", "choice" if "enum" in option else "value")) for option in options)
    return " or ".join(dict.fromkeys(kinds))


def _range_text(schema: Mapping[str, Any]) -> str:
    texts = []
    for option in schema.get("anyOf", [schema]):
        option = option.get("items", option)  # those of one item
        if "enum" in option:
            texts.append(" | ".join(map(str, option["enum"])))
        signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
        texts += [f"{sign} {option[key]:g}" for key, sign in signs.items() if key in option]
    return ", ".join(texts)
