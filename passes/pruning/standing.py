"""Where the pruning of a program stands: what ranking reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx

from graphopt.axes.groups import Group, Member
from graphopt.axes.infer import Axes
from graphopt.axes.layout import Layout, leaves
from graphopt.ir.graph import tensor_attribute
from graphopt.ir.program import Program
from graphopt.passes.pruning.index_rows import by_index, rows
from graphopt.pipeline.context import Context

# What each group's surviving indices are worth, (indices left,), by axis; or why they cannot be told apart.
Worths = Mapping[int, torch.Tensor | str]


@dataclass(frozen=True)
class Standing:
    """A program between two rounds of removal.

    Attributes:
        program: as it is now.
        axes: of the program as it was; nodes keep their names, tensors have lost what is not kept.
        kept: the indices each axis has kept; an axis that is absent has all.
        ctx: data and randomness.
        samples: how many samples may be used.
    """

    program: Program
    axes: Axes
    kept: Mapping[int, Sequence[int]]
    ctx: Context
    samples: int

    def weight(self, member: Member) -> torch.Tensor:
        """Return the tensor of a member as it is now, in float64."""
        return tensor_attribute(self.program.graph_module, member.parameter).detach().double()

    def by_index(self, values: torch.Tensor, member: Member, axis: int) -> torch.Tensor:
        """Sum over what each index owns in something of the shape of a member's tensor, (indices left,)."""
        return by_index(values, member.dim, member.layout, axis, self.kept)

    def rows(self, member: Member, axis: int) -> torch.Tensor:
        """Return what each index owns of a member's tensor as one row, (indices left, elements)."""
        return rows(self.weight(member), member.dim, member.layout, axis, self.kept)

    def readings(self, group: Group) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Yield the calls that sum over a group's axis, each with the values of the axis it reads.

        Nodes are those of the program as it is now.
        """
        for call in self._weighing(group) if group.consumers else self._summing(group.axis):
            for value in call.all_input_nodes:
                if value not in self._constants and self.carries(value, group.axis):
                    yield call, value

    def _weighing(self, group: Group) -> list[fx.Node]:
        """Return the first calls that see data on the way down from the weights that consume a group's axis."""
        names = {member.parameter for member in group.consumers}
        pending = [node for node in self.program.graph.nodes if node.op == "get_attr" and node.target in names]
        met: dict[fx.Node, None] = {}
        while pending:
            for user in pending.pop(0).users:
                if user in self._constants:
                    pending.append(user)
                else:
                    met[user] = None
        return list(met)

    def _summing(self, axis: int) -> list[fx.Node]:
        """Return the calls that carry an axis no further."""
        calls = (node for node in self.program.graph.nodes if node.op == "call_function")
        return [call for call in calls if self._is_tensor(call) and not self.carries(call, axis)]

    def _is_tensor(self, node: fx.Node) -> bool:
        return node.name in self._twins and self._twins[node.name] in self.axes.layouts

    def carries(self, node: fx.Node, axis: int) -> bool:
        """Tell whether a value has a dimension of static size with the axis in it."""
        twin = self._twins.get(node.name)
        dims = () if twin is None else self.axes.layouts.get(twin, ())
        return any(_static(layout) and axis in {leaf.id for leaf in leaves(layout)} for layout in dims)

    def dims(self, node: fx.Node, axis: int) -> list[int]:
        """Return the dimensions of a value that `carries` looks at."""
        layouts = self.axes.layouts[self._twins[node.name]]
        return [d for d, one in enumerate(layouts) if _static(one) and axis in {leaf.id for leaf in leaves(one)}]

    def static_layout(self, node: fx.Node, dim: int) -> Layout | None:
        """Return the layout of a dimension of a value of the program as it is now; None where it has no fixed size."""
        twin = self._twins.get(node.name)
        layouts = () if twin is None else self.axes.layouts.get(twin, ())
        return layouts[dim] if dim < len(layouts) and _static(layouts[dim]) else None

    def is_constant(self, node: fx.Node) -> bool:
        """Tell whether a value is computed of parameters and buffers alone."""
        return node in self._constants

    def sums(self, node: fx.Node, value: torch.Tensor, dim: int, axis: int) -> torch.Tensor:
        """Sum over what each index owns in a value of a node, (indices left,)."""
        return by_index(value, dim, self.axes.layouts[self._twins[node.name]][dim], axis, self.kept)

    @cached_property
    def _twins(self) -> dict[str, fx.Node]:
        return {node.name: node for node in self.axes.gm.graph.nodes}

    @cached_property
    def _constants(self) -> frozenset[fx.Node]:
        """What is computed of parameters and buffers alone."""
        found: set[fx.Node] = set()
        for node in self.program.graph.nodes:
            inputs = node.all_input_nodes
            if node.op == "get_attr" or (node.op == "call_function" and inputs and found.issuperset(inputs)):
                found.add(node)
        return frozenset(found)


def _static(layout: Layout) -> bool:
    return all(isinstance(axis.size, int) for axis in leaves(layout))
