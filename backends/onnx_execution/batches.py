"""Inputs to verify an artifact on: batches of several sizes out of a few samples.

A program is run at 1, 3 and 8 samples; a dear one, as ResNet-18 at 224 x 224 is, at 1 and 3. What a batch of 8 adds is
the kernels' way through a wider product, not another graph: the optimizer never sees the size.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from graphopt.ir.program import Program
from graphopt.ir.signature import TensorSpec
from graphopt.measure.cost import cost
from graphopt.targets.backend import Array

BATCH_SIZES = (1, 3, 8)
_FEW_SIZES = 2  # those that every program is run at
_MOST_FLOPS = 2e10  # operations of all sizes together: half a second on one core

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def batches(program: Program, inputs: Sequence[Array] | None) -> Iterator[tuple[str, tuple[Array, ...]]]:
    """Yield flat inputs at each batch size, or once where that is fixed, each with words for its size.

    Args:
        program: whose inputs they are.
        inputs: samples to draw from (first axis), cycled through; the program's examples if None. Examples are few,
            so those that repeat get their elements shuffled: values stay valid, and no two rows are equal.
    """
    examples = tuple(tensor.detach().numpy() for tensor in program.flat_examples())
    source = examples if inputs is None else tuple(inputs)
    symbol = _batch_symbol(program.inputs)
    for size in _sizes(program) if symbol else (0,):
        arrays = tuple(
            _sized(spec, array, example, symbol, size, shuffle=inputs is None)
            for spec, array, example in zip(program.inputs, source, examples, strict=True)
        )
        yield (f"at batch size {size}" if symbol else "at the program's own sizes"), arrays


def _sizes(program: Program) -> Sequence[int]:
    dear = sum(BATCH_SIZES) * cost(program).flops > _MOST_FLOPS
    return BATCH_SIZES[:_FEW_SIZES] if dear else BATCH_SIZES


def _batch_symbol(specs: Sequence[TensorSpec]) -> str:
    """Return the name of the batch axis, "" if there is none."""
    for spec in specs:
        if spec.batched:
            found = re.search(r"[A-Za-z_]\w*", str(spec.shape[0]))
            if found:
                return found[0]
    return ""


def _sized(spec: TensorSpec, array: Array, example: Array, symbol: str, size: int, *, shuffle: bool) -> Array:
    """Bring an array to the sizes an input has at this batch size."""
    for axis, dimension in enumerate(spec.shape):
        if isinstance(dimension, int):
            wanted = dimension
        else:
            known = evaluate(dimension, {symbol: size}) if symbol else None
            wanted = array.shape[axis] if known is None else known
        array = _resized(array, axis, wanted, shuffle=shuffle)
    return array.astype(example.dtype, copy=False)


def _resized(array: Array, axis: int, wanted: int, *, shuffle: bool) -> Array:
    have = array.shape[axis]
    if have == wanted:
        return array
    taken = np.take(array, np.arange(wanted), axis=axis, mode="wrap")
    if shuffle:
        generator = np.random.default_rng(0)
        rows = np.moveaxis(taken, axis, 0)
        for row in range(have, wanted):
            rows[row] = generator.permutation(rows[row].reshape(-1)).reshape(rows[row].shape)
    return taken


def evaluate(expression: str, sizes: dict[str, int]) -> int | None:
    """Return the value of a size expression ("2*batch"), None if it depends on a name without a size."""
    return _value(ast.parse(expression, mode="eval").body, sizes)


def _value(node: ast.expr, sizes: dict[str, int]) -> int | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return sizes.get(node.id)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left, sizes), _value(node.right, sizes)
        return None if left is None or right is None else _OPERATORS[type(node.op)](left, right)
    return None
