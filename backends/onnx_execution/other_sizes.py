"""Inputs to verify an artifact on: other sizes of the dynamic axes beside the batch.

What an operator was written for at the size of the example is of no use at another. So each name of an axis gets a
smaller value and a larger one, with everything that depends on it ("2*n"), in a batch as small as may be.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence

from graphopt.backends.onnx_execution.batches import drawn
from graphopt.ir.batch_sizes import BatchSizes
from graphopt.ir.program import Program
from graphopt.ir.signature import TensorSpec
from graphopt.ir.size_expressions import evaluate, names_in, values_of_names
from graphopt.ir.sizes import MOST_AT_LEAST
from graphopt.targets.backend import Array

Shapes = list[list[int]]

_STEPS = (1, 2, 4, 8, 16, 32)  # a network that halves its input takes multiples


def other_sizes(program: Program, inputs: Sequence[Array] | None) -> Iterator[Iterator[tuple[str, tuple[Array, ...]]]]:
    """Yield flat inputs, each with words for its size, in groups: the first that the program takes speaks for all.

    Args:
        program: whose inputs they are.
        inputs: samples to draw from, as for `batches`.
    """
    examples = [tuple(array.shape) for array in (program.flat_examples() if inputs is None else inputs)]
    batch = BatchSizes(program.inputs, examples)
    (fewest,) = batch.near([1])
    pairs = zip(program.inputs, examples, strict=True)
    known = values_of_names(pair for spec, own in pairs for pair in zip(spec.shape, own, strict=True))

    def shapes(name: str, value: int) -> Shapes | None:
        """Return those of the inputs where a name has another value, None where it may not."""
        values = {**known, batch.symbol: batch.values.least, name: value}
        found = [batch.shape(spec, fewest, own) for spec, own in zip(program.inputs, examples, strict=True)]
        for spec, own, shape in zip(program.inputs, examples, found, strict=True):
            for axis in _axes(spec, name):
                size = evaluate(str(spec.shape[axis]), values)
                most = max(MOST_AT_LEAST, 2 * own[axis])
                if size is None or size > most or size not in spec.range_of(axis):
                    return None
                shape[axis] = size
        return found

    for name, value in known.items():
        if name == batch.symbol or name in batch.alike:  # which the batches vary together
            continue
        least = 1 + bisect.bisect_left(range(1, value), True, key=lambda size, name=name: bool(shapes(name, size)))  # type: ignore[misc]
        smaller = {least, value // 2, *(value - step for step in _STEPS)}
        larger = {*(value + step for step in _STEPS), 2 * value}
        for sizes in ({size for size in smaller if least <= size < value}, larger):
            tried = [found for size in sorted(sizes) if (found := shapes(name, size))]
            yield ((_where(program.inputs, name, found), drawn(program, inputs, found)) for found in tried)


def _axes(spec: TensorSpec, name: str) -> list[int]:
    return [axis for axis, size in enumerate(spec.shape) if isinstance(size, str) and name in names_in(size)]


def _where(inputs: Iterable[TensorSpec], name: str, shapes: Shapes) -> str:
    spec, axis, shape = next(
        (s, axes[0], shape) for s, shape in zip(inputs, shapes, strict=True) if (axes := _axes(s, name))
    )
    return f"where axis {axis} of `{spec.name}` has a size of {shape[axis]}"
