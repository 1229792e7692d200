"""What plans, options and manifests are made of: data that JSON holds as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from typing_extensions import TypeAliasType

from graphopt.errors import cut, printable

if TYPE_CHECKING:
    from pydantic import ValidationError

Json = TypeAliasType("Json", "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None")


def first_problem(err: ValidationError) -> str:
    """Say where data is first not what it must be, and what is the matter: "`plans.0.target`: field required"."""
    first = err.errors()[0]
    where = cut(printable(".".join(map(str, first["loc"])) or "it"), 80)
    known = first["type"] == "unexpected_keyword_argument"
    return f"`{where}`: {'a field it does not know' if known else cut(first['msg'].lower())}"
