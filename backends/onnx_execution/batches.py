"""Inputs to verify an artifact on: batches of several sizes out of a few samples.

A program is run at 1, 3 and 8 samples; a dear one, as ResNet-18 at 224 x 224 is, at 1 and 3. What a batch of 8 adds is
the kernels' way through a wider product, not another graph: the optimizer never sees the size. Of a program that takes
some numbers of samples only it is the first, the third and the eighth of these, or the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from graphopt.ir.batch_sizes import BatchSizes
from graphopt.ir.program import Program
from graphopt.measure.cost import cost
from graphopt.targets.backend import Array

BATCH_SIZES = (1, 3, 8)
_FEW_SIZES = 2  # those that every program is run at
_MOST_FLOPS = 2e10  # operations of all sizes together: half a second on one core


def batches(program: Program, inputs: Sequence[Array] | None) -> Iterator[tuple[str, tuple[Array, ...]]]:
    """Yield flat inputs at each batch size, or once where that is fixed, each with words for its size.

    Args:
        program: whose inputs they are.
        inputs: samples to draw from (first axis), cycled through; the program's examples if None. Examples are few,
            so those that repeat get their elements shuffled: values stay valid, and no two rows are equal.
    """
    examples = [array.shape for array in (program.flat_examples() if inputs is None else inputs)]
    sizes = BatchSizes(program.inputs, examples)
    for samples in sizes.near(_wanted(program)) if sizes.symbol else (0,):
        shapes = [sizes.shape(spec, samples, own) for spec, own in zip(program.inputs, examples, strict=True)]
        where = f"at batch size {samples}" if sizes.symbol else "at the program's own sizes"
        yield where, drawn(program, inputs, shapes)


def drawn(program: Program, inputs: Sequence[Array] | None, shapes: Sequence[Sequence[int]]) -> tuple[Array, ...]:
    """Return flat inputs of these shapes out of samples, as `batches` does."""
    examples = tuple(tensor.detach().numpy() for tensor in program.flat_examples())
    return tuple(
        _resized(array, shape, shuffle=inputs is None).astype(example.dtype, copy=False)
        for array, shape, example in zip(examples if inputs is None else inputs, shapes, examples, strict=True)
    )


def _wanted(program: Program) -> Sequence[int]:
    dear = sum(BATCH_SIZES) * cost(program).flops > _MOST_FLOPS
    return BATCH_SIZES[:_FEW_SIZES] if dear else BATCH_SIZES


def _resized(array: Array, shape: Sequence[int], *, shuffle: bool) -> Array:
    for axis, wanted in enumerate(shape):
        array = _along(array, axis, wanted, shuffle=shuffle)
    return array


def _along(array: Array, axis: int, wanted: int, *, shuffle: bool) -> Array:
    have = array.shape[axis]
    if have == wanted:
        return array
    taken: Array = np.take(array, np.arange(wanted) % have, axis=axis)  # `mode="wrap"` takes the square of the time
    if shuffle:
        generator = np.random.default_rng(0)
        more = np.moveaxis(taken, axis, 0)[have:]
        flat = more.reshape(len(more), math.prod(more.shape[1:]))
        more[:] = generator.permuted(flat, axis=1).reshape(more.shape)
    return taken
