"""What a program would cost with fewer indices, from the sizes of its layouts alone.

    parameters, bytes    a tensor's elements times, for each dimension, the share of its positions that is left
    operations           of a convolution or matrix product: its own, times the same share for each dimension that
                         it runs over (`operations`)

Removing and measuring gives the same and takes a second on a large model; a search asks hundreds of times.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from graphopt.axes.infer import Axes
from graphopt.axes.layout import leaves
from graphopt.axes.rewrite import Kept
from graphopt.ir.graph import tensor_attribute
from graphopt.ir.ownership import memory_key
from graphopt.ir.program import Program
from graphopt.measure.cost import Cost, cost, node_flops, weights
from graphopt.passes.pruning.operations import SizeProduct, parts_of


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
        self._tensors = [part for part in _tensors(program, axes) if _concerned(part[0], free)]
        self._calls: list[SizeProduct] = []
        self._operations = 0  # of all calls, for all samples of the example
        self.complete = True
        for node in axes.gm.graph.nodes:
            if node.op == "call_function" and (flops := node_flops(node)):
                self._operations += flops
                parts = parts_of(node, axes, flops)
                self._calls += [part for part in parts or () if _concerned(part, free)]
                self.complete = self.complete and (parts is not None or not _near(node, axes, free))

    def cost(self, kept: Kept) -> Cost:
        """Return the cost of the program when each axis keeps so many indices; an axis that is absent keeps all."""
        lost = [(part.amount - part.left(kept), is_weight, width) for part, is_weight, width in self._tensors]
        gone = sum(part.amount - part.left(kept) for part in self._calls) / max(self._operations, 1)
        return Cost(
            parameters=self._whole.parameters - round(sum(count for count, is_weight, _ in lost if is_weight)),
            flops=round(self._whole.flops * (1 - gone)),
            bytes=self._whole.bytes - round(sum(count * width for count, _, width in lost)),
        )


def _tensors(program: Program, axes: Axes) -> list[tuple[SizeProduct, bool, int]]:
    """Return each distinct tensor with whether it is a weight and the bytes of an element."""
    found: dict[tuple[Any, ...], tuple[SizeProduct, bool, int]] = {}
    learned = weights(program)
    for name, dims in axes.parameters.items():
        tensor = tensor_attribute(axes.gm, name)
        key = memory_key(tensor)
        found.setdefault(key, (SizeProduct(tensor.numel(), dims), key in learned, tensor.element_size()))
    return list(found.values())


def _concerned(part: SizeProduct, free: set[int]) -> bool:
    return any(axis.id in free for layout in part.layouts for axis in leaves(layout))


def _near(node: fx.Node, axes: Axes, free: set[int]) -> bool:
    """Tell whether anything a call reads or makes may shrink."""
    dims = (axes.layouts.get(other, ()) for other in (node, *node.all_input_nodes))
    return any(axis.id in free for layouts in dims for layout in layouts for axis in leaves(layout))
