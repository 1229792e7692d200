"""Axes of one: torch.export traces sizes of two or more, and takes what a model asks of that for granted (2.13).

    y.mean(1) if y.shape[1] > 1 else y.sum(1)       the trace holds the mean, and notes no question

The range of an axis begins at two where the program is not the model at one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from graphopt.capturing.compared import Compared
from graphopt.capturing.smallest_call import bound_to
from graphopt.ir.program import Program
from graphopt.ir.signature import TensorSpec
from graphopt.ir.size_expressions import evaluate, names_in
from graphopt.ir.sizes import SizeRange


def without_ones(program: Program, compared: Compared) -> Program:
    """Return a program whose axes, but for first ones, are of two or more where it is not the model at one."""
    examples = program.flat_examples()
    pairs = [*zip(program.inputs, examples, strict=True)]
    traced = {str(size): own for spec, tensor in pairs for size, own in zip(spec.shape, tensor.shape, strict=True)}
    first = {spec.shape[0] for spec in program.inputs if spec.shape}
    names = dict.fromkeys(size for spec in program.inputs for size in spec.shape if isinstance(size, str))
    for name in (name for name in names if name not in first and names_in(name) == (name,)):
        shapes = [_shape(spec, {**traced, name: 1}, tensor.shape) for spec, tensor in pairs]
        allowed = all(
            size in spec.range_of(axis)
            for spec, shape in zip(program.inputs, shapes, strict=True)
            for axis, size in enumerate(shape)
            if isinstance(spec.shape[axis], str)
        )
        if allowed and compared.at(shapes)[0]:  # a model that fails takes no such size
            program = bound_to(program, [_of_two(spec, name) for spec in program.inputs])
    return program


def _shape(spec: TensorSpec, sizes: Mapping[str, int], example: Sequence[int]) -> list[int]:
    found = [evaluate(size, sizes) if isinstance(size, str) else size for size in spec.shape]
    return [own if size is None else size for size, own in zip(found, example, strict=True)]


def _of_two(spec: TensorSpec, name: str) -> TensorSpec:
    ranges = [
        spec.range_of(axis) & SizeRange(2) if size == name else spec.range_of(axis)
        for axis, size in enumerate(spec.shape)
    ]
    return dataclasses.replace(spec, ranges=tuple(ranges))
