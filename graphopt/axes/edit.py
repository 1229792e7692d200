"""What a rewrite sees: one call of the new graph, the layouts of the old one, and what each axis keeps."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from graphopt.axes.layout import Dims, Layout, Size, size, surviving_size, touches
from graphopt.axes.layouts import Layouts
from graphopt.errors import PassError
from graphopt.ir.graph import arguments
from graphopt.ir.operators import short_name
from graphopt.ir.provenance import Origin, origin, record
from graphopt.ir.torch_internals import OpOverload


class Edit:
    """One call whose literals are being brought up to date.

    Args:
        node: the call in the new graph.
        old: the same call in the graph the axes were inferred on.
        axes: the result of that inference.
        kept: the indices each axis keeps.
        new_of: the new node of each old one.
        made_by: the pass on whose behalf nodes are inserted.
    """

    def __init__(
        self,
        node: fx.Node,
        old: fx.Node,
        axes: Layouts,
        kept: Mapping[int, Sequence[int]],
        new_of: Mapping[fx.Node, fx.Node],
        made_by: str,
    ) -> None:
        self.node = node
        self.inserted: list[fx.Node] = []
        self._old = old
        self._axes = axes
        self._kept = kept
        self._new_of = new_of
        self._made_by = made_by

    # -- what is there -----------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Return the operator's argument names in schema order."""
        return list(arguments(self._old, ()))

    def arg(self, name: str) -> Any:
        """Return an argument of the new call by schema name, default filled in."""
        return arguments(self.node, ()).get(name)

    def dims(self, name: str) -> Dims:
        """Return the old layouts of tensor argument `name`."""
        return self._axes.dims(arguments(self._old, ())[name])

    def result(self) -> Dims:
        """Return the old layouts of the call's tensor result."""
        return self._axes.dims(self._old)

    def results(self) -> list[Dims | None]:
        """Return the old layouts of each of the call's several results."""
        return self._axes.results(self._old)

    def has_note(self, key: str) -> bool:
        """Tell whether the rule kept a layout under this name."""
        return key in self._axes.notes.get(self._old, {})

    def note(self, key: str) -> Layout:
        """Return the layout the rule kept under this name."""
        return self._axes.notes[self._old][key]

    def position(self, name: str, rank: int) -> int:
        """Return a dimension argument counted from the front."""
        value = int(self.arg(name))
        return value + rank if value < 0 else value

    # -- what it becomes ---------------------------------------------------------------------------------

    def changed(self, layout: Layout) -> bool:
        """Tell whether a dimension loses positions."""
        return touches(layout, self._kept)

    def old_size(self, layout: Layout) -> int:
        """Return the static size a dimension had."""
        length = size(layout)
        assert isinstance(length, int)  # only static dimensions shrink
        return length

    def new_size(self, layout: Layout) -> Any:
        """Return the size a dimension has now: an int, or a node that computes it."""
        length = surviving_size(layout, self._kept)
        return length if isinstance(length, int) else self._compute(length)

    def sizes(self, layouts: Sequence[Layout], given: Sequence[Any]) -> list[Any]:
        """Return a size list that fits the new layouts; -1 stays, and so does what has not changed."""
        return [
            self.new_size(layout) if old != -1 and (self.changed(layout) or self._stale(old)) else old
            for layout, old in zip(layouts, given, strict=True)
        ]

    def set(self, name: str, value: Any) -> None:
        """Set an argument of the new call by schema name."""
        target = self.node.target
        assert isinstance(target, OpOverload)
        position = next(i for i, a in enumerate(target._schema.arguments) if a.name == name)
        if position < len(self.node.args):
            self.node.update_arg(position, value)
        else:
            self.node.update_kwarg(name, value)

    def retarget(self, target: OpOverload, /, **values: Any) -> None:
        """Let the call be of another operator, with the given arguments in schema order."""
        self.node.target = target
        self.node.args = tuple(values.values())
        self.node.kwargs = {}

    def _stale(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and self._axes.stale(value, self._kept, self._new_of)

    def _compute(self, expression: Size) -> fx.Node:
        """Insert the computation of a dynamic size from the sizes of the graph's inputs."""
        factor, rest = sympy.sympify(expression).as_coeff_Mul()
        result: Any = int(factor)
        for term in sympy.Mul.make_args(rest):
            power = int(term.exp) if isinstance(term, sympy.Pow) and term.exp.is_Integer else 1
            base = term.base if power != 1 else term
            for _ in range(power):
                result = self._multiply(result, self._size_node(base))
        if not isinstance(result, fx.Node):
            raise PassError(f"`{self.node.name}`: the size {expression} is not dynamic.")
        return result

    def _multiply(self, a: Any, b: fx.Node) -> fx.Node:
        return b if a == 1 else self._insert(operator.mul, b, a)

    def _size_node(self, expression: Size) -> fx.Node:
        source = self._axes.symbol_source(expression, before=self._old)
        if source is None:
            raise PassError(
                f"`{self.node.name}` needs the dynamic size {expression}, which no earlier node has. "
                "Capture with fewer dynamic dimensions."
            )
        node, dim = source
        found = self._insert(torch.ops.aten.sym_size.int, self._new_of[node], dim)
        times = sympy.simplify(surviving_size(self._axes.dims(node)[dim], self._kept) / expression)
        return found if times == 1 else self._insert(operator.floordiv, found, int(times))

    def _insert(self, target: Any, *args: Any) -> fx.Node:
        with self.node.graph.inserting_before(self.node):
            node = self.node.graph.call_function(target, args)
        for key in ("nn_module_stack", "stack_trace"):
            if key in self.node.meta:
                node.meta[key] = self.node.meta[key]
        base = origin(self._old) or Origin(self._old.name, "", short_name(self._old))
        record(node, Origin(base.node, base.module, base.op, self._made_by, self._old.name))
        self.inserted.append(node)
        return node
