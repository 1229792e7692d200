"""Work: what calls of a program have to do for one sample, in the terms of cost tables.

kernel                    special cases with costs of their own
conv1d, conv2d, ..        conv2d_pointwise: a kernel of one tap; conv2d_depthwise: a group for each channel;
                          conv2d_grouped: other groups, conv2d_narrow: of less than sixteen channels each, which no
                          vector is full of; conv2d_first: of four channels at most
add, mul                  add_broadcast, mul_broadcast: of operands of different sizes
quantize, dequantize      quantize_map, dequantize_map: of more than one place per channel, which integer kernels keep
                          in another order than float ones
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx

from graphopt.ir.graph import arguments
from graphopt.ir.operators import ALL_CONVOLUTIONS
from graphopt.ir.program import Program
from graphopt.ir.torch_internals import free_symbols, optimization_hint, pytree
from graphopt.measure.cost import node_flops
from graphopt.targets.costs import Work

_FEW_CHANNELS = 4
_VECTOR = 16  # channels that kernels for images hold beside each other


class Workload:
    """Counts what the calls of one program do for one sample, or for one batch where that has a fixed size."""

    def __init__(self, program: Program) -> None:
        values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        batched = [value for spec, value in zip(program.inputs, tensors, strict=True) if spec.batched]
        self._batch = {symbol for value in batched for symbol in free_symbols(value.shape[0])}
        self._samples = max((_size(value.shape[0]) for value in batched), default=1)

    def elements(self, node: fx.Node) -> float:
        """Return how many elements a value has."""
        tensors = _tensors(node)
        return sum(math.prod(map(_size, tensor.shape)) for tensor in tensors) / self._share(tensors)

    def of(self, node: fx.Node) -> Work:
        """Return what a call does."""
        operations = node_flops(node) / self._share(_tensors(node))
        return Work(operations, sum(map(self.elements, node.all_input_nodes)) + self.elements(node))

    def _share(self, tensors: Sequence[torch.Tensor]) -> int:
        return self._samples if any(free_symbols(tensor) & self._batch for tensor in tensors) else 1


def special_kernel(kernel: str, node: fx.Node) -> str:
    """Return under which name a call of a kernel has costs."""
    if kernel in ("add", "mul"):
        operands = [value for value in node.all_input_nodes if _tensors(value)]
        shapes = {tuple(map(_size, _tensors(value)[0].shape)) for value in (*operands, node)}
        return kernel if len(shapes) == 1 else f"{kernel}_broadcast"
    if node not in ALL_CONVOLUTIONS or not kernel.startswith("conv"):
        return kernel
    given = arguments(node, ())
    if int(given.get("groups", 1)) > 1:
        if is_depthwise(node):
            return f"{kernel}_depthwise"
        return f"{kernel}_narrow" if _size(_tensors(given["weight"])[0].shape[1]) < _VECTOR else f"{kernel}_grouped"
    source, weight = (_tensors(given[name])[0].shape for name in ("input", "weight"))
    if _size(source[1]) <= _FEW_CHANNELS:
        return f"{kernel}_first"
    return f"{kernel}_pointwise" if all(_size(size) == 1 for size in weight[2:]) else kernel


def special_move(kernel: str, value: fx.Node) -> str:
    """Return under which name "quantize" or "dequantize" of a value has costs."""
    return f"{kernel}_map" if is_map(value) else kernel


def is_depthwise(node: fx.Node) -> bool:
    """Whether a call is a convolution with a group for each of several channels."""
    if node not in ALL_CONVOLUTIONS:
        return False
    given = arguments(node, ())
    return 1 < int(given.get("groups", 1)) == _size(_tensors(given["input"])[0].shape[1])


def is_map(value: fx.Node) -> bool:
    """Whether a value has more than one place for each channel, along at least two axes: layouts are of those."""
    shapes = [tensor.shape for tensor in _tensors(value)]
    return any(len(shape) > 3 and math.prod(map(_size, shape[2:])) > 1 for shape in shapes)


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor)]


def _size(size: int | torch.SymInt) -> int:
    return optimization_hint(size, fallback=1)
