"""Groups: the axes that may lose indices, with every parameter and buffer dimension that goes with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import fx

from graphopt.axes.layout import Axis, Concat, Dims, Layout, Product, leaves, size
from graphopt.axes.roles import Role, Roles
from graphopt.axes.solver import Solver
from graphopt.ir.graph import tensor_attribute
from graphopt.ir.names import Names

_MATRIX = 2  # a weight of more dimensions is a convolution's
_FEWEST = 2  # an axis of one index has nothing to remove


@dataclass(frozen=True, slots=True)
class Member:
    """One dimension of a parameter or buffer that carries the axis of a group."""

    parameter: str  # qualified name
    dim: int
    layout: Layout  # of that dimension, of which the group's axis is a leaf


@dataclass(frozen=True, slots=True)
class Group:
    """A removable axis.

    Attributes:
        axis: its id, the key of `kept`.
        size: how many indices it has.
        name: unique and stable: the weight that produces it first, and its kind.
        kind: `channels`, `hidden`, `heads`, `head_dim` or `width` (the axis several weights write to).
        members: every parameter and buffer dimension that carries it, in order of use.
        producers: the members whose weights produce it (its output dimension).
        consumers: the members whose weights sum over it (its input dimension); none where only a product of two
            activations does, as the head dimension of query and key.
    """

    axis: int
    size: int
    name: str
    kind: str
    members: tuple[Member, ...]
    producers: tuple[Member, ...]
    consumers: tuple[Member, ...]

    @property
    def weighed(self) -> tuple[Member, ...]:
        """Return the weights without which an index has no effect: the consumers, or else the producers."""
        return self.consumers or self.producers


@dataclass(frozen=True, slots=True)
class Unremovable:
    """An axis that some weight produces, or consumes, and that must stay whole."""

    axis: int
    size: int
    name: str
    parameter: str
    reason: str


def coordinates(layout: Layout, axis: int) -> list[list[int]]:
    """Return, for each occurrence of an axis in a layout, its index at every position (-1: not there).

    Example: an axis of 2 in (2 x 3) gives [[0, 0, 0, 1, 1, 1]]; in [2 | 1] it gives [[0, 1, -1]].
    """
    if isinstance(layout, Axis):
        assert isinstance(layout.size, int)  # groups are static
        return [list(range(layout.size))] if layout.id == axis else []
    parts = layout.factors if isinstance(layout, Product) else layout.segments
    sizes = [int(size(part)) for part in parts]
    found: list[list[int]] = []
    for index, part in enumerate(parts):
        before, after = sizes[:index], sizes[index + 1 :]
        for inner in coordinates(part, axis):
            if isinstance(layout, Concat):
                found.append([-1] * sum(before) + inner + [-1] * sum(after))
            else:
                repeat = _prod(after)
                found.append([i for i in inner for _ in range(repeat)] * _prod(before))
    return found


def _prod(values: Iterable[int]) -> int:
    result = 1
    for value in values:
        result *= value
    return result


def collect(
    gm: fx.GraphModule, parameters: Mapping[str, Dims], roles: Roles, solver: Solver
) -> tuple[list[Group], list[Unremovable]]:
    """Return the removable axes and the refused ones, in order of the first parameter that carries each."""
    members: dict[int, list[Member]] = {}
    axes: dict[int, Axis] = {}
    for name, dims in parameters.items():
        for d, layout in enumerate(dims):
            for axis in dict.fromkeys(leaves(layout)):
                axes.setdefault(axis.id, axis)
                members.setdefault(axis.id, []).append(Member(name, d, layout))
    trained = {name for name in parameters if isinstance(tensor_attribute(gm, name), torch.nn.Parameter)}
    produced, consumed = _sources(roles, solver, "produce"), _sources(roles, solver, "consume")
    summed = {axis.id for layout in roles.summed for axis in leaves(solver.resolve(layout))}
    kinds = _Kinds(roles, solver, parameters)
    groups: list[Group] = []
    refusals: list[Unremovable] = []
    names = Names(mark="#")  # `layer1.conv1:channels`, `layer1.conv1:channels#2`
    left: list[tuple[Axis, list[Member], str, str]] = []
    for number, axis in axes.items():
        makers = [m for m in members[number] if m.parameter in trained and _among(m, produced.get(number, {}))]
        users = [m for m in members[number] if _among(m, consumed.get(number, {}))]
        if not makers and not users:
            continue
        kind = kinds.of(axis, makers or users)
        reason = _refused(axis, makers, users, number in summed)
        if reason is not None:
            left.append((axis, makers or users, kind, reason))
            continue
        name = names.new(_described(makers[0], kind))
        groups.append(Group(number, int(axis.size), name, kind, *map(tuple, (members[number], makers, users))))
    # What can be pruned takes the plain names; what cannot is numbered on.
    for axis, holders, kind, reason in left:
        if isinstance(axis.size, int):
            name = names.new(_described(holders[0], kind))
            refusals.append(Unremovable(axis.id, axis.size, name, holders[0].parameter, reason))
    return groups, refusals


def _described(member: Member, kind: str) -> str:
    return f"{member.parameter.removesuffix('.weight')}:{kind}"


def _refused(axis: Axis, makers: list[Member], users: list[Member], summed: bool) -> str | None:
    if axis.frozen is not None:
        return axis.frozen
    if not makers:
        return "no weight produces it"
    if not users and not summed:
        return "no weight consumes it"
    return f"{axis.size} index left" if isinstance(axis.size, int) and axis.size < _FEWEST else None


_Places: TypeAlias = dict[tuple[str, int | None], None]


def _among(member: Member, places: _Places) -> bool:
    return (member.parameter, member.dim) in places or (member.parameter, None) in places


def _sources(roles: Roles, solver: Solver, role: Role) -> dict[int, _Places]:
    """Return the weights, and their dimension where known, that have a role for each axis."""
    found: dict[int, _Places] = {}
    for record in roles.of(role):
        for axis in leaves(solver.resolve(record.layout)):
            found.setdefault(axis.id, {}).update({(name, record.dim): None for name in record.sources})
    return found


class _Kinds:
    """Names the kind of an axis from how it is used."""

    def __init__(self, roles: Roles, solver: Solver, parameters: Mapping[str, Dims]) -> None:
        self._parameters = parameters
        self._marks: dict[int, dict[str, None]] = {}
        for layout, kind in roles.marks:
            for axis in leaves(solver.resolve(layout)):
                self._marks.setdefault(axis.id, {})[kind] = None

    def of(self, axis: Axis, makers: list[Member]) -> str:
        """Return the kind of an axis."""
        marks = self._marks.get(axis.id, {})
        if "heads" in marks:
            return "heads"
        if "head_dim" in marks:
            return "head_dim"
        if len({m.parameter for m in makers}) > 1 and all(m.layout == axis for m in makers):
            return "width"
        return "channels" if any(len(self._parameters[m.parameter]) > _MATRIX for m in makers) else "hidden"
