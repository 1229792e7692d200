"""Which weights produce an axis and which consume it, and what kind of axis it is.

A weight is any value computed from parameters and buffers alone: a parameter, its transpose, a normalised or
low-rank product of several. Roles are recorded on layouts while the equations are still being solved, and
read once they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import fx

from graphopt.axes.layout import Axis, Layout

Role = Literal["produce", "consume"]


@dataclass(frozen=True, slots=True)
class Record:
    """`sources` produce or consume the axes of `layout`."""

    role: Role
    sources: tuple[str, ...]
    layout: Layout
    dim: int | None  # of the parameter, where it is used as it is; None where it was computed with first


class Roles:
    """Collected while the graph is walked."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.marks: list[tuple[Layout, str]] = []
        self.summed: list[Layout] = []  # in a product of two activations, query times key
        self._sources: dict[fx.Node, tuple[str, ...] | None] = {}
        self._plain: dict[fx.Node, None] = {}  # reads of a parameter, and what is handed it as it is

    def read(self, node: fx.Node, name: str) -> None:
        """Note that `node` reads the parameter or buffer `name`."""
        self._sources[node] = (name,)
        self._plain[node] = None

    def hand(self, node: fx.Node, operand: fx.Node, *, whole: bool) -> None:
        """Note that the input `node` of a region's body is an operand of the region, or a slice of it."""
        self._sources[node] = self._sources.get(operand)
        if whole and operand in self._plain:
            self._plain[node] = None

    def call(self, node: fx.Node) -> None:
        """Derive whether a call is computed from weights alone from its inputs."""
        names: dict[str, None] = {}
        for argument in node.all_input_nodes:
            sources = self._sources.get(argument)
            if sources is None:
                self._sources[node] = None
                return
            names.update(dict.fromkeys(sources))
        self._sources[node] = tuple(names)

    def sources(self, node: fx.Node) -> tuple[str, ...]:
        """Return the parameters and buffers `node` is computed from, () if it depends on an input too."""
        return self._sources.get(node) or ()

    def add(self, role: Role, node: fx.Node, layout: Layout, dim: int) -> None:
        """Record that the weights behind `node` have a role for its dimension `dim`."""
        self.records.append(Record(role, self.sources(node), layout, dim if node in self._plain else None))

    def mark(self, axes: Iterable[Axis], kind: str) -> None:
        """Record the kind of some axes."""
        self.marks.extend((axis, kind) for axis in axes)

    def of(self, role: Role) -> Iterator[Record]:
        """Iterate over the records of one role."""
        return (record for record in self.records if record.role == role)
