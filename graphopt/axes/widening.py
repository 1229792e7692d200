"""Growing axes: more channels than a model has, without an effect, for kernels that compute many at once. Exact.

    W: (72, 24, 1, 1) -> V: (40, 72, 1, 1)    becomes    W': (80, 24, 1, 1) -> V': (40, 80, 1, 1)

What is new is a copy of the first channel, so that no value is one that was not there before, and no range changes. The
weights that sum over the axis are zero there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from graphopt.axes.groups import Group
from graphopt.axes.infer import Axes
from graphopt.axes.layout import leaves
from graphopt.axes.registry import is_pointwise
from graphopt.axes.rewrite import positions, reindex, taken
from graphopt.errors import PassError
from graphopt.ir.graph import arguments, tensor_attribute
from graphopt.ir.operators import (
    ACTIVATIONS,
    ADAPTIVE_AVERAGE_POOLS,
    AVERAGE_POOLS,
    CASTS,
    CONVOLUTIONS,
    MAX_POOLS,
    MOVES,
    TRANSPOSED_CONVOLUTIONS,
    UPSAMPLES,
    Family,
    short_name,
)
from graphopt.ir.ownership import memory_key
from graphopt.ir.regions import graph_modules
from graphopt.ir.torch_internals import OpOverload

_LAYERS = CONVOLUTIONS | TRANSPOSED_CONVOLUTIONS | Family("linear")
# What makes each channel of one channel, beside what is pointwise; the dimensions they pool over are frozen.
_POOLS = AVERAGE_POOLS | ADAPTIVE_AVERAGE_POOLS | MAX_POOLS
_APART = ACTIVATIONS | MOVES | CASTS | _POOLS | UPSAMPLES | Family("cat", "pad", "prelu")
_REDUCTIONS = Family("mean", "sum", "amax", "amin")


def widen(gm: fx.GraphModule, axes: Axes, sizes: Mapping[str, int], made_by: str) -> fx.GraphModule:
    """Return a copy of the graph in which groups have more channels, and which computes the same.

    Args:
        gm: the graph the axes were inferred on; it is not changed.
        axes: the inferred axes.
        sizes: how many channels each group has then, by its name.
        made_by: the pass on whose behalf nodes are inserted.

    Raises:
        PassError: there is no such group, or it cannot have that many.
    """
    groups, growing = {group.name: group for group in axes.groups()}, Growing(axes)
    for name, size in sizes.items():
        if name not in groups:
            raise PassError(f"There is no group `{name}` to widen in this program. Make the plan again.")
        why = f"{size} are fewer" if size < groups[name].size else growing.why_not(groups[name])
        if why is not None:
            raise PassError(f"`{name}` cannot have {size} channels in place of {groups[name].size}: {why}.")
    wider = [groups[name] for name in sizes]
    indices = {group.axis: [*range(group.size), *[0] * (sizes[group.name] - group.size)] for group in wider}
    return reindex(gm, axes, indices, made_by, instead=_without_effect(axes, wider, indices))


class Growing:
    """Tells which groups of a graph may have more channels."""

    def __init__(self, axes: Axes) -> None:
        """Count how often each tensor is read."""
        self._axes = axes
        self._reads = Counter[object]()
        for node in axes.gm.graph.nodes:
            if node.op == "get_attr" and node in axes.layouts:
                self._reads[memory_key(tensor_attribute(axes.gm, str(node.target)))] += len(node.users)

    def why_not(self, group: Group) -> str | None:
        """Return why more channels of a group would not be without effect, or None."""
        if not group.consumers:
            return "no weight sums over it"
        for member in group.members:
            if self._reads[memory_key(tensor_attribute(self._axes.gm, member.parameter))] > 1:
                return f"`{member.parameter}` is read more than once"
        for module in graph_modules(self._axes.gm):
            for node in module.graph.nodes:
                if node.op == "call_function" and not _keeps_apart(self._axes, node, group.axis):
                    return f"{short_name(node)} at `{node.name}` may compute across it"
        return None


def _keeps_apart(axes: Axes, node: fx.Node, axis: int) -> bool:
    """Whether each channel that a call makes depends on one channel alone, or it sums them by a stored weight."""
    carriers = [read for read in node.all_input_nodes if axes.touched(read, {axis: ()})]
    if not carriers or node in _APART or (isinstance(node.target, OpOverload) and is_pointwise(node.target)):
        return True
    given = arguments(node, ())
    if node in _LAYERS:
        return isinstance(given["weight"], fx.Node) and given["weight"].op == "get_attr"
    if node in _REDUCTIONS:
        return node in axes.layouts and _count(axes, node, axis) == sum(_count(axes, one, axis) for one in carriers)
    return short_name(node) == "batch_norm" and not given["training"]


def _count(axes: Axes, node: fx.Node, axis: int) -> int:
    return sum(leaf.id == axis for layout in axes.dims(node) for leaf in leaves(layout))


def _without_effect(
    axes: Axes, groups: Sequence[Group], indices: Mapping[int, Sequence[int]]
) -> dict[str, torch.Tensor]:
    """Return the weights that sum over groups, zero at what is there again."""
    found: dict[str, torch.Tensor] = {}
    where = positions(axes, indices)
    for member in (member for group in groups for member in group.consumers):
        name, along = member.parameter, where[member.parameter][member.dim]
        if name not in found:
            found[name] = taken(tensor_attribute(axes.gm, name), where[name])
        first = {index: place for place, index in reversed(list(enumerate(along)))}
        again = [place for place, index in enumerate(along) if first[index] != place]
        found[name].index_fill_(member.dim, torch.tensor(again, dtype=torch.long, device=found[name].device), 0)
    return found
