"""Which sizes the axes of inputs may have, in a file: ONNX knows names of dynamic axes alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated

import pydantic

from graphopt.errors import LoweringError, first_problem
from graphopt.ir.signature import TensorSpec
from graphopt.ir.sizes import MOST_AT_LEAST, SizeRange

_PROPERTY = "graphopt.sizes"  # of the model: {input: [[least, most or null] of each axis]}
_Least = Annotated[int, pydantic.Field(ge=0, le=MOST_AT_LEAST)]
_Most = Annotated[int, pydantic.Field(ge=1, lt=1 << 63)]


def _ordered(ends: tuple[int, int | None]) -> tuple[int, int | None]:
    if ends[1] is not None and ends[0] > ends[1]:
        raise ValueError(f"{ends[0]} to {ends[1]} is no range")
    return ends


_Ends = Annotated[tuple[_Least, _Most | None], pydantic.AfterValidator(_ordered)]
_STORED = pydantic.TypeAdapter(dict[str, tuple[_Ends, ...]], config=pydantic.ConfigDict(strict=True))


def recorded_ranges(inputs: Sequence[TensorSpec]) -> dict[str, str]:
    """Return what a file says of the sizes of its inputs, nothing where they may be any."""
    bound = {spec.name: [[sizes.least, sizes.most] for sizes in spec.ranges] for spec in inputs if spec.ranges}
    return {_PROPERTY: json.dumps(bound)} if bound else {}


def ranges_of(properties: Mapping[str, str]) -> dict[str, tuple[SizeRange, ...]]:
    """Read what a file says of the sizes of its inputs, by name.

    Raises:
        LoweringError: it is damaged.
    """
    try:
        stored = _STORED.validate_json(properties.get(_PROPERTY, "{}"))
    except pydantic.ValidationError as err:
        problem = first_problem(err)
        raise LoweringError(f"What the file says of sizes ({_PROPERTY}) is damaged: {problem}.") from err
    return {name: tuple(SizeRange(*ends) for ends in axes) for name, axes in stored.items()}
