"""What pydantic finds in data reads the same wherever the data come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pydantic
import pytest

from graphopt.errors import first_problem


class Model(pydantic.BaseModel, extra="forbid"):
    """Data of a file."""

    counts: list[int]


@pydantic.dataclasses.dataclass(config=pydantic.ConfigDict(extra="forbid"))
@dataclass
class Options:
    """Options of a pass, which say themselves what they cannot be."""

    low: int = 0

    def __post_init__(self) -> None:
        if self.low < 0:
            raise ValueError("KL needs a low of 0 or more.")


@pytest.mark.parametrize(
    ("kind", "data", "said"),
    [
        (Model, {"counts": [1, "a"]}, "`counts.1`: input should be a valid integer, unable to parse string as an "),
        (Model, {}, "`counts`: field required"),
        (Model, {"counts": [], "\x1b[2J": 1}, r"`\x1b[2J`: a field it does not know"),
        (Model, {"counts": [], "x" * 100: 1}, f"`{'x' * 77}...`: a field it does not know"),
        (Model, 3, "`it`: input should be a valid dictionary or instance of Model"),
        (Options, {"lower": 1}, "`lower`: a field it does not know"),
        (Options, {"low": -1}, "`it`: KL needs a low of 0 or more"),
    ],
)
def test_the_first_problem(kind: type[Any], data: object, said: str) -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        pydantic.TypeAdapter(kind).validate_python(data)
    assert str(first_problem(caught.value)).startswith(said)
