"""Which sizes the axes of inputs may have, in a file: ONNX knows names of dynamic axes alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated

import pydantic

from graphopt.errors import LoweringError, first_problem
from graphopt.ir.signature import TensorSpec
from graphopt.ir.sizes import SizeRange

_PROPERTY = "graphopt.sizes"  # of the model: {input: [[least, most or null] of each axis]}
_Stored = Annotated[SizeRange, pydantic.PlainValidator(SizeRange.stored)]
_STORED = pydantic.TypeAdapter(dict[str, tuple[_Stored, ...]])


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
        return _STORED.validate_json(properties.get(_PROPERTY, "{}"))
    except pydantic.ValidationError as err:
        problem = first_problem(err)
        raise LoweringError(f"What the file says of sizes ({_PROPERTY}) is damaged: {problem}.") from err
