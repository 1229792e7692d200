"""How the operations of a call follow from the sizes of what it runs over.

convolution, linear, matrix product    everything in the result x everything it sums over
attention                              scores x query width, and scores x value width
einsum                                 the same for each pair of operands, from left to right
LSTM, GRU, RNN                         every step of every sample x each weight matrix
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.axes.infer import Axes
from graphopt.axes.layout import ONE, Layout, size, surviving_size, touches
from graphopt.axes.rewrite import Kept
from graphopt.axes.rules.contraction import parse_equation
from graphopt.ir.graph import arguments
from graphopt.ir.operators import CONVOLUTIONS, RECURRENT_LAYERS, TRANSPOSED_CONVOLUTIONS
from graphopt.ir.torch_internals import optimization_hint

aten = torch.ops.aten
# operator: the two operands; the first one's last dimension is summed over
FACTORS = {
    aten.linear: ("input", "weight"),
    aten.mm: ("self", "mat2"),
    aten.bmm: ("self", "mat2"),
    aten.matmul: ("self", "other"),
    aten.addmm: ("mat1", "mat2"),
    aten.baddbmm: ("batch1", "batch2"),
}

_Labelled = dict[str, tuple[Layout, int]]  # an operand of an einsum, with sizes in the example


@dataclass(frozen=True)
class SizeProduct:
    """Something that counts as a product of sizes.

    Attributes:
        amount: of the whole.
        layouts: what it is in proportion to.
        summed: those of them without which nothing is counted: where all are of size 1, nothing is summed.
    """

    amount: int
    layouts: tuple[Layout, ...]
    summed: tuple[Layout, ...] = ()

    def left(self, kept: Kept) -> float:
        """Return how much of it is left."""
        if self.summed and all(surviving_size(layout, kept) == 1 for layout in self.summed):
            return 0.0
        share = 1.0
        for layout in self.layouts:
            if touches(layout, kept):
                share *= float(surviving_size(layout, kept) / size(layout))
        return self.amount * share


def parts_of(node: fx.Node, axes: Axes, flops: int) -> list[SizeProduct] | None:
    """Return the operations of a call as products of sizes, None for one whose form is not known.

    Args:
        node: the call.
        axes: of its graph.
        flops: how many it has, for all samples of the example.
    """
    packet = getattr(node.target, "overloadpacket", None)
    if packet is None:
        return None
    given = arguments(node, ())
    if node in RECURRENT_LAYERS:
        return _recurrent(given, axes, flops)
    if node not in axes.layouts:
        return None
    result = axes.layouts[node]
    if node in CONVOLUTIONS:
        return [SizeProduct(flops, (*result, *axes.layouts[given["weight"]][1:]))]
    if node in TRANSPOSED_CONVOLUTIONS:
        return [SizeProduct(flops, (*axes.layouts[given["input"]], *axes.layouts[given["weight"]][1:]))]
    if packet in FACTORS:
        return [SizeProduct(flops, (*result, axes.layouts[given[FACTORS[packet][0]]][-1]))]
    if packet is aten.scaled_dot_product_attention:
        return _attention(given, axes, flops)
    return _einsum(given, axes, flops) if packet is aten.einsum else None


def _attention(given: Mapping[str, Any], axes: Axes, flops: int) -> list[SizeProduct] | None:
    """Return query times key, and scores times value."""
    query, key, value = (axes.layouts[given[name]] for name in ("query", "key", "value"))
    wide, out = size(query[-1]), size(value[-1])
    if not isinstance(wide, int) or not isinstance(out, int):
        return None
    first = flops * wide // (wide + out)
    scores = (*query[:-1], key[-2])
    return [SizeProduct(first, (*scores, query[-1])), SizeProduct(flops - first, (*scores, value[-1]))]


def _recurrent(given: Mapping[str, Any], axes: Axes, flops: int) -> list[SizeProduct] | None:
    """Return each weight matrix times every step."""
    sequence = axes.layouts.get(given["input" if "input" in given else "data"])
    weights = [axes.layouts.get(weight) for weight in given["params"]]
    if sequence is None or None in weights:
        return None
    matrices = [dims for dims in weights if dims is not None and len(dims) == 2]
    elements = [math.prod(int(size(layout)) for layout in dims) for dims in matrices]
    each = flops // sum(elements)  # two for each step
    return [SizeProduct(each * count, (*sequence[:-1], *dims)) for count, dims in zip(elements, matrices, strict=True)]


def _einsum(given: Mapping[str, Any], axes: Axes, flops: int) -> list[SizeProduct] | None:
    """Return every pair that is multiplied and summed; None where they are not what is counted."""
    tensors = given["tensors"]
    terms, result = parse_equation(given["equation"], [len(axes.layouts[node]) for node in tensors])
    labelled: list[_Labelled] = []
    for term, node in zip(terms, tensors, strict=True):
        sizes = (optimization_hint(length, fallback=1) for length in node.meta["val"].shape)  # as `cost` counts
        dims = zip(term, axes.layouts[node], sizes, strict=True)
        labelled.append({label: (layout, length) for label, layout, length in dims if layout != ONE})
    parts = list(_pairs(labelled, set(result), list(given["path"] or ())))
    return parts if sum(part.amount for part in parts) == flops else None


def _pairs(operands: list[_Labelled], result: set[str], path: list[int]) -> Iterator[SizeProduct]:
    """Yield each batched matrix product, in the order in which torch 2.13 contracts.

    A label of one operand alone is summed before, which is no product; where nothing is summed, none is either.
    """
    while len(operands) > 1:
        first, second = sorted(path[:2]) if path else (0, 1)
        b, a = operands.pop(second), operands.pop(first)
        elsewhere = result.union(*operands)
        summed = {label for label in a if label in b and label not in elsewhere}
        both = {label: dim for label, dim in {**a, **b}.items() if label in elsewhere or label in summed}
        if summed:
            layouts, lengths = zip(*both.values(), strict=True)
            yield SizeProduct(2 * math.prod(lengths), layouts, tuple(both[label][0] for label in sorted(summed)))
        left = {label: dim for label, dim in both.items() if label not in summed}
        operands.insert(len(operands) if path else 0, left)
        path = path[2:]
