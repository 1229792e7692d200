"""Which sizes the axes of inputs may have, in a file: ONNX knows names of dynamic axes alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from graphopt.errors import LoweringError, first_line
from graphopt.ir.signature import TensorSpec
from graphopt.ir.sizes import SizeRange

_PROPERTY = "graphopt.sizes"  # of the model: {input: [[least, most or null] of each axis]}


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
        stored = json.loads(properties.get(_PROPERTY, "{}"))
        return {
            str(name): tuple(SizeRange(int(least), None if most is None else int(most)) for least, most in axes)
            for name, axes in stored.items()
        }
    except (AttributeError, TypeError, ValueError, RecursionError) as err:
        raise LoweringError(f"What the file says of sizes ({_PROPERTY}) is damaged: {first_line(err)}.") from err
