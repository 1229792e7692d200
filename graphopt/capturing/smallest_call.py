"""The fewest samples that a program runs on, which no trace asks for: five taps along the batch need five."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import io
from collections.abc import Iterable

import torch

from graphopt.capturing.checks import resized, run_program
from graphopt.capturing.compared import Compared
from graphopt.errors import CaptureError
from graphopt.ir.batch_sizes import BatchSizes
from graphopt.ir.buffers import with_its_buffers
from graphopt.ir.program import Program
from graphopt.ir.signature import TensorSpec, range_notes
from graphopt.ir.size_expressions import linear
from graphopt.ir.sizes import SizeRange


def with_the_smallest_call(program: Program, compared: Compared | None = None) -> Program:
    """Return a program whose ranges of sizes begin where it runs: at one sample where nothing else is known.

    What runs on some samples is taken to run on more, up to those of its examples, on which it has run.

    Args:
        program: as captured or loaded.
        compared: what is known of it.
    """
    examples = program.flat_examples()
    sizes = BatchSizes(program.inputs, [tensor.shape for tensor in examples])
    if not sizes.symbol:
        return program
    rows = next(len(tensor) for spec, tensor in zip(program.inputs, examples, strict=True) if spec.batched)

    @functools.cache
    def runs_on(samples: int) -> bool:
        shapes = [
            sizes.shape(spec, samples, tensor.shape) for spec, tensor in zip(program.inputs, examples, strict=True)
        ]
        if compared is not None and compared.agree(shapes):
            return True
        args, kwargs = program.unflatten([resized(*pair) for pair in zip(examples, shapes, strict=True)])
        try:  # torch writes the traceback of what a graph raises by itself
            with with_its_buffers(program.graph_module), torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
                run_program(program, args, kwargs)
        except CaptureError:
            return False
        return True

    (least,) = sizes.near([1])
    if runs_on(least):
        return program
    found = bisect.bisect_left(range(rows), True, lo=least + 1, key=lambda samples: runs_on(sizes.nearest(samples)))
    return bound_to(program, [_narrowed(spec, sizes, found) for spec in program.inputs])


def bound_to(program: Program, inputs: Iterable[TensorSpec]) -> Program:
    """Return a program whose inputs have other ranges of sizes, and the notes that say them."""
    inputs = tuple(inputs)
    others = [note for note in program.notes if note not in range_notes(program.inputs)]
    return dataclasses.replace(program, inputs=inputs, notes=(*range_notes(inputs), *others))


def _narrowed(spec: TensorSpec, sizes: BatchSizes, samples: int) -> TensorSpec:
    """Return an input of so many samples or more."""
    smallest = sizes.shape(spec, samples, [0] * len(spec.shape))
    lines = [linear(size) if isinstance(size, str) else None for size in spec.shape]
    ranges = [
        spec.range_of(axis) & SizeRange(smallest[axis])
        if line and line.name == sizes.symbol and line.factor > 0
        else spec.range_of(axis)
        for axis, line in enumerate(lines)
    ]
    return dataclasses.replace(spec, ranges=tuple(ranges))
