"""What inference found out about one graph: the layout of every dimension, and where a size comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from graphopt.axes.layout import Axis, Dims, Layout, Product, Size, concat, product, size, touches
from graphopt.axes.solver import Solver
from graphopt.ir.regions import graph_modules


class Annotated:
    """Turns layouts into what they are once solving is done, each axis with its freezing reason."""

    def __init__(self, solver: Solver) -> None:
        self._solver = solver
        self._axes: dict[int, Layout] = {}

    def __call__(self, layout: Layout) -> Layout:
        if isinstance(layout, Axis):
            if layout.id not in self._axes:
                resolved = self._solver.resolve(layout)
                self._axes[layout.id] = (
                    Axis(resolved.id, resolved.size, self._solver.reason(resolved))
                    if isinstance(resolved, Axis)
                    else self(resolved)
                )
            return self._axes[layout.id]
        if isinstance(layout, Product):
            return product(map(self, layout.factors))
        return concat(map(self, layout.segments))


class Layouts:
    """The layouts of one graph.

    Attributes:
        gm: the graph.
        layouts: for each tensor-valued node, those in regions included, the layout of each dimension; several
            results: via their getitem.
        notes: for each call the layouts its rule keeps for the call's rewrite.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        known: Mapping[fx.Node, Any],
        notes: Mapping[fx.Node, Mapping[str, Layout]],
        annotated: Annotated,
    ) -> None:
        self.gm = gm
        self._several: dict[fx.Node, list[Dims | None]] = {}
        self.layouts: dict[fx.Node, Dims] = {}
        for node, shape in known.items():
            if isinstance(shape, tuple):
                self.layouts[node] = tuple(annotated(layout) for layout in shape)
            elif isinstance(shape, list):
                self._several[node] = [
                    None if dims is None else tuple(annotated(layout) for layout in dims) for dims in shape
                ]
        self.notes = {node: {key: annotated(layout) for key, layout in kept.items()} for node, kept in notes.items()}
        nodes = (node for module in graph_modules(gm) for node in module.graph.nodes)
        self._order = {node: index for index, node in enumerate(nodes)}
        self._symbols: dict[tuple[fx.Graph, Size], tuple[fx.Node, int]] | None = None

    def dims(self, node: fx.Node) -> Dims:
        """Return the layouts of the dimensions of a tensor-valued node."""
        return self.layouts[node]

    def results(self, node: fx.Node) -> list[Dims | None]:
        """Return the layouts of each of several results; None for those that are not tensors."""
        return self._several[node]

    def touched(self, node: fx.Node, kept: Mapping[int, Sequence[int]]) -> bool:
        """Tell whether any dimension of a node's value loses positions."""
        shapes = [self.layouts[node]] if node in self.layouts else self._several.get(node, [])
        return any(touches(layout, kept) for dims in shapes if dims is not None for layout in dims)

    def symbol_source(self, expression: Size, before: fx.Node) -> tuple[fx.Node, int] | None:
        """Return the first node of a graph, if before a node of it, and dimension of a dynamic size or a multiple."""
        if self._symbols is None:
            self._symbols = {}
            for node, dims in self.layouts.items():
                for d, layout in enumerate(dims):
                    factors = layout.factors if isinstance(layout, Product) else (layout,)
                    dynamic = [factor for factor in factors if not isinstance(size(factor), int)]
                    if len(dynamic) == 1:
                        self._symbols.setdefault((node.graph, size(dynamic[0])), (node, d))
        found = self._symbols.get((before.graph, expression))
        return found if found is not None and self._order[found[0]] < self._order[before] else None

    def stale(self, value: fx.Node, kept: Mapping[int, Sequence[int]], new_of: Mapping[fx.Node, fx.Node]) -> bool:
        """Tell whether a size computed in the new graph derives from a dimension that shrank."""
        old_of = {new: old for old, new in new_of.items()} if value not in self._order else {}
        pending = [old_of.get(value, value)]
        while pending:
            node = pending.pop()
            for argument in node.all_input_nodes:
                if argument in self.layouts or argument in self._several:
                    if self.touched(argument, kept):
                        return True
                else:
                    pending.append(argument)
        return False
