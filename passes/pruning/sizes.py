"""What a program would cost with fewer indices, from the sizes of its layouts alone.

    parameters, bytes    a tensor's elements times, for each dimension, the share of its positions that is left
    operations           of a convolution or matrix product: its own, times the same share for each dimension that
                         it runs over, those of the result and those it sums over

Removing and measuring gives the same and takes a second on a large model; a search asks hundreds of times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.axes.infer import Axes
from graphopt.axes.layout import Layout, leaves, size, surviving_size, touches
from graphopt.cost import Cost, cost, node_flops
from graphopt.graph import arguments, tensor_attribute
from graphopt.program import Program

aten = torch.ops.aten
_CONVOLUTIONS = (aten.conv1d, aten.conv2d, aten.conv3d)
_TRANSPOSED = (aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d)
# operator: the operand whose last dimension is summed over
_PRODUCTS = {
    aten.linear: "input",
    aten.mm: "self",
    aten.bmm: "self",
    aten.matmul: "self",
    aten.addmm: "mat1",
    aten.baddbmm: "batch1",
}

Kept = Mapping[int, Sequence[int]]


@dataclass(frozen=True)
class _Part:
    """Something that counts as a product of sizes."""

    amount: int
    layouts: tuple[Layout, ...]

    def left(self, kept: Kept) -> float:
        """Return how much of it is left."""
        share = 1.0
        for layout in self.layouts:
            if touches(layout, kept):
                share *= float(surviving_size(layout, kept) / size(layout))
        return self.amount * share


class Sizes:
    """Predicts the cost of a program from how many indices its axes keep."""

    def __init__(self, program: Program, axes: Axes) -> None:
        """Collect what counts.

        Args:
            program: before the removal.
            axes: of it.
        """
        self._whole = cost(program)
        free = {group.axis for group in axes.groups()}
        self._tensors = [part for part in _tensors(axes) if _concerned(part[0], free)]
        self._calls: list[_Part] = []
        self._operations = 0  # of all calls, for all samples of the example
        self.complete = True
        for node in axes.gm.graph.nodes:
            if node.op == "call_function" and (flops := node_flops(node)):
                self._operations += flops
                parts = _parts(node, axes, flops)
                self._calls += [part for part in parts or () if _concerned(part, free)]
                self.complete = self.complete and (parts is not None or not _near(node, axes, free))

    def cost(self, kept: Kept) -> Cost:
        """Return the cost of the program when each axis keeps so many indices; an axis that is absent keeps all."""
        lost = [(part.amount - part.left(kept), trained, width) for part, trained, width in self._tensors]
        gone = sum(part.amount - part.left(kept) for part in self._calls) / max(self._operations, 1)
        return Cost(
            parameters=self._whole.parameters - round(sum(count for count, trained, _ in lost if trained)),
            flops=round(self._whole.flops * (1 - gone)),
            bytes=self._whole.bytes - round(sum(count * width for count, _, width in lost)),
        )


def _tensors(axes: Axes) -> list[tuple[_Part, bool, int]]:
    """Return each distinct tensor with whether it is trained and the bytes of an element."""
    found: dict[int, tuple[_Part, bool, int]] = {}
    for name, dims in axes.parameters.items():
        tensor = tensor_attribute(axes.gm, name)
        trained = isinstance(tensor, torch.nn.Parameter)
        found.setdefault(id(tensor), (_Part(tensor.numel(), dims), trained, tensor.element_size()))
    return list(found.values())


def _parts(node: fx.Node, axes: Axes, flops: int) -> list[_Part] | None:
    """Return the operations of a call as products of sizes, None for an operator whose form is not known."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet is None or node not in axes.layouts:
        return None
    given = arguments(node, ())
    result = axes.layouts[node]
    if packet in _CONVOLUTIONS:
        return [_Part(flops, (*result, *axes.layouts[given["weight"]][1:]))]
    if packet in _TRANSPOSED:
        return [_Part(flops, (*axes.layouts[given["input"]], *axes.layouts[given["weight"]][1:]))]
    if packet in _PRODUCTS:
        return [_Part(flops, (*result, axes.layouts[given[_PRODUCTS[packet]]][-1]))]
    if packet is aten.scaled_dot_product_attention:
        return _attention(given, axes, flops)
    return None


def _attention(given: Mapping[str, Any], axes: Axes, flops: int) -> list[_Part] | None:
    """Return query times key, and scores times value."""
    query, key, value = (axes.layouts[given[name]] for name in ("query", "key", "value"))
    wide, out = size(query[-1]), size(value[-1])
    if not isinstance(wide, int) or not isinstance(out, int):
        return None
    first = flops * wide // (wide + out)
    scores = (*query[:-1], key[-2])
    return [_Part(first, (*scores, query[-1])), _Part(flops - first, (*scores, value[-1]))]


def _concerned(part: _Part, free: set[int]) -> bool:
    return any(axis.id in free for layout in part.layouts for axis in leaves(layout))


def _near(node: fx.Node, axes: Axes, free: set[int]) -> bool:
    """Tell whether anything a call reads or makes may shrink."""
    dims = (axes.layouts.get(other, ()) for other in (node, *node.all_input_nodes))
    return any(axis.id in free for layouts in dims for layout in layouts for axis in leaves(layout))
