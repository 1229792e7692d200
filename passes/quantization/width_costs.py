"""What a call takes less with more channels, by a table of costs: an uneven depthwise layer less, all around it more.

seconds of a call  =  table(operations, elements)  *  depthwise_uneven    of a depthwise layer, not of a multiple
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import fx

from graphopt.axes.groups import Group
from graphopt.axes.infer import Axes
from graphopt.axes.layout import Dims, size, surviving_size, touches
from graphopt.measure.work import Workload, special_kernel
from graphopt.passes.quantization.kernels import kernel_of
from graphopt.passes.quantization.paying import Accounts, Charge
from graphopt.passes.quantization.placement import Placement
from graphopt.passes.quantization.prepare import Prepared
from graphopt.targets.costs import CostTable, Work
from graphopt.targets.description import TargetDescription

_Sizes = Mapping[int, range]  # by axis the indices it has then


class WidthCosts:
    """Weighs groups that get wider, each for itself."""

    def __init__(self, axes: Axes, placed: Prepared, placement: Placement, target: TargetDescription) -> None:
        """Prepare to weigh.

        Args:
            axes: of the program before it was prepared.
            placed: that program.
            placement: where its integers stand.
            target: what the runtime can do.
        """
        self._axes, self._target, self._gm = axes, target, placed.source.graph_module
        self._accounts, self._work = Accounts(placement, placed), Workload(placed.source)

    def saved(self, group: Group, width: int, table: CostTable) -> float:
        """Return how many seconds less a call takes with so many channels, with as many samples as it is least for."""
        then = {group.axis: range(width)}
        nodes = [node for node in self._gm.graph.nodes if self._carries(node, then)]
        return min(
            sum(self._seconds(node, {}, table, samples) - self._seconds(node, then, table, samples) for node in nodes)
            for samples in (table.batches if self._accounts.any_batch else table.batches[:1])
        )

    def _carries(self, node: fx.Node, then: _Sizes) -> bool:
        return node.op == "call_function" and any(
            self._axes.touched(value, then) for value in (node, *node.all_input_nodes)
        )

    def _seconds(self, node: fx.Node, then: _Sizes, table: CostTable, samples: int) -> float:
        operations, elements = self._growth(node, then)
        dims = self._axes.layouts.get(node, ())
        uneven = len(dims) > 1 and surviving_size(dims[1], then) % self._target.depthwise_multiple != 0
        total = 0.0
        for charge in self._charges(node):
            work = Work(operations * charge.work.operations, elements * charge.work.elements)
            slower = uneven and charge.form != "float" and charge.kernel.endswith("_depthwise")
            seconds = table.seconds(charge.kernel, charge.form, work, samples) or 0.0
            total += seconds * (self._target.depthwise_uneven if slower else 1.0)
        return total

    def _charges(self, node: fx.Node) -> list[Charge]:
        if node.name in self._accounts.sites:
            return self._accounts.on_integers(node.name)
        kernel = kernel_of(node, self._gm)
        return [] if kernel is None else [Charge(special_kernel(kernel.name, node), "float", self._work.of(node))]

    def _growth(self, node: fx.Node, then: _Sizes) -> tuple[float, float]:
        """Return how many times as many operations and elements a call has then."""
        values = {value: self._work.elements(value) for value in (node, *node.all_input_nodes)}
        grown = sum(count * _grown(self._axes.layouts.get(value, ()), then) for value, count in values.items())
        elements = grown / (sum(values.values()) or 1.0)
        kernel = kernel_of(node, self._gm)
        layer = None if kernel is None else kernel.layer
        return elements if layer is None else _grown(self._axes.layouts.get(layer.weight, ()), then), elements


def _grown(dims: Dims, then: _Sizes) -> float:
    return math.prod(float(surviving_size(one, then) / size(one)) for one in dims if touches(one, then))
