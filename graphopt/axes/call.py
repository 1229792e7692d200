"""What a rule sees: one call's arguments as layouts, and the equations it may state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx

from graphopt.axes.layout import ONE, Axis, Concat, Dims, Layout, Product, Size, leaves, shape_of, size
from graphopt.axes.roles import Roles
from graphopt.axes.solver import Solver, equal
from graphopt.ir.graph import arguments
from graphopt.ir.operators import schema_name
from graphopt.ir.torch_internals import OpOverload, pytree


class Call:
    """One call of an operator while its equations are being stated."""

    def __init__(
        self,
        node: fx.Node,
        solver: Solver,
        roles: Roles,
        known: dict[fx.Node, Any],
    ) -> None:
        self.node = node
        self.where = f"{schema_name(node.target)} (`{node.name}`)"
        self.notes: dict[str, Layout] = {}
        self._solver = solver
        self._roles = roles
        self._known = known
        self._arguments = arguments(node, ()) if isinstance(node.target, OpOverload) else {}

    # -- arguments ---------------------------------------------------------------------------------------

    def arg(self, name: str) -> Any:
        """Return an argument by schema name, default filled in."""
        return self._arguments[name]

    def names(self) -> list[str]:
        """Return the operator's argument names in schema order."""
        return list(self._arguments)

    def has(self, name: str) -> bool:
        """Tell whether the argument is a tensor."""
        return self._is_tensor(self._arguments.get(name))

    def dims(self, name: str) -> Dims:
        """Return the layouts of the dimensions of tensor argument `name`."""
        return self.dims_of(self._arguments[name])

    def dims_of(self, node: Any) -> Dims:
        """Return the layouts of the dimensions of a tensor-valued node."""
        known = self._known[node]
        assert isinstance(known, tuple)
        return tuple(self._solver.resolve(layout) for layout in known)

    def many(self, name: str) -> list[Dims]:
        """Return the layouts of each tensor of a list argument."""
        return [self.dims_of(node) for node in self._arguments[name] if self._is_tensor(node)]

    def tensors(self) -> list[Dims]:
        """Return the layouts of every tensor argument that is not in a list, in schema order."""
        return [self.dims_of(value) for value in self._arguments.values() if self._is_tensor(value)]

    def everything(self) -> list[Dims]:
        """Return the layouts of every tensor argument, those in lists included, in schema order."""
        values = pytree.tree_leaves(list(self._arguments.values()))
        return [self.dims_of(value) for value in values if self._is_tensor(value)]

    def position(self, name: str, rank: int) -> int:
        """Return a dimension argument counted from the front."""
        value = int(self.arg(name))
        return value + rank if value < 0 else value

    def positions(self, name: str, rank: int) -> list[int]:
        """Return a dimension-list argument counted from the front; None or empty means every dimension."""
        value = self.arg(name)
        if value is None or value == []:
            return list(range(rank))
        given = [value] if isinstance(value, int) else list(value)
        return [int(d) + rank if int(d) < 0 else int(d) for d in given]

    def shape(self, index: int | None = None) -> tuple[Size, ...]:
        """Return the sizes of the result, or of result `index` of several."""
        value = self.node.meta["val"]
        return shape_of(value if index is None else value[index])

    # -- equations ---------------------------------------------------------------------------------------

    def axis(self, length: Size, reason: str | None = None) -> Layout:
        """Return a new axis, kept whole if a reason is given."""
        return self._solver.axis(length, reason)

    def axes(self, lengths: Iterable[Size], reason: str | None = None) -> Dims:
        """Return one new axis for each size."""
        return tuple(self._solver.axis(length, reason) for length in lengths)

    def unify(self, a: Layout, b: Layout) -> None:
        """State that two dimensions have the same positions; size 1 broadcasts and states nothing."""
        a, b = self._solver.resolve(a), self._solver.resolve(b)
        if a != ONE and b != ONE:
            self._solver.unify(a, b, self.where)

    def unify_terms(self, a: Layout, b: Layout) -> None:
        """State that two terms of equal size have the same positions, size 1 included."""
        self._solver.unify(a, b, self.where)

    def unify_dims(self, a: Sequence[Layout], b: Sequence[Layout]) -> None:
        """Unify dimension by dimension."""
        for left, right in zip(a, b, strict=True):
            self.unify(left, right)

    def freeze(self, layouts: Layout | Iterable[Layout], reason: str) -> None:
        """Keep every axis of the layouts whole; the reason reads `reason at operator (node)`."""
        for layout in (layouts,) if isinstance(layouts, Axis | Product | Concat) else layouts:
            self._solver.freeze(layout, f"{reason} at {self.where}")

    def because(self, reason: str) -> str:
        """Return a freezing reason that names this call."""
        return f"{reason} at {self.where}"

    def whole(self, reason: str) -> Dims:
        """Keep every axis of every tensor argument and of the result whole; return the layouts of the result."""
        for dims in self.everything():
            self.freeze(dims, reason)
        return self.axes(self.shape(), self.because(reason))

    def broadcast(self, operands: Sequence[Dims]) -> Dims:
        """Unify operands aligned at their last dimension; return the layouts of the result."""
        rank = max((len(dims) for dims in operands), default=0)
        result: list[Layout] = [ONE] * rank
        for dims in operands:
            for offset, layout in enumerate(dims, start=rank - len(dims)):
                if result[offset] == ONE:
                    result[offset] = layout
                else:
                    self.unify(result[offset], layout)
        return tuple(self._solver.resolve(layout) for layout in result)

    def same_size(self, a: Layout, b: Layout) -> bool:
        """Tell whether two layouts are known to have the same size."""
        return equal(size(a), size(b))

    def sized(self, layout: Layout, length: Size) -> bool:
        """Tell whether a dimension is known to have the given size."""
        return equal(size(layout), length)

    def ratio(self, whole: Layout, part: Layout) -> Size:
        """Return how many times one size goes into another; the operator guarantees that it does."""
        return self.quotient(size(whole), part)

    def quotient(self, length: Size, part: Layout) -> Size:
        """Return how many times a dimension goes into a length; the operator guarantees that it does."""
        divisor = size(part)
        return length // divisor if isinstance(length, int) and isinstance(divisor, int) else length / divisor

    # -- what the rewriting and the groups need to know --------------------------------------------------

    def note(self, key: str, layout: Layout) -> Layout:
        """Keep a layout under a name for the call's rewrite; return it."""
        self.notes[key] = layout
        return layout

    def is_weight(self, node: Any) -> bool:
        """Tell whether a node is computed from parameters and buffers alone."""
        return isinstance(node, fx.Node) and bool(self._roles.sources(node))

    def produces(self, node: Any, dim: int, layout: Layout | None = None) -> None:
        """Record that the weights behind `node` produce the axes of its dimension `dim` (or part of it)."""
        self._roles.add("produce", node, self.dims_of(node)[dim] if layout is None else layout, dim)

    def consumes(self, node: Any, dim: int, layout: Layout | None = None) -> None:
        """Record that the weights behind `node` consume (sum over) the axes of its dimension `dim`."""
        self._roles.add("consume", node, self.dims_of(node)[dim] if layout is None else layout, dim)

    def sums(self, layout: Layout) -> None:
        """Record that the axes of a dimension are summed in a product of activations, as a weight would sum them."""
        self._roles.summed.append(layout)

    def mark(self, layout: Layout, kind: str) -> None:
        """Record what the static axes of a dimension are called: `heads`, `head_dim`."""
        self._roles.mark([axis for axis in leaves(layout) if isinstance(axis.size, int)], kind)

    def _is_tensor(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and isinstance(self._known.get(value), tuple)
