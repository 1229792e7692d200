"""Gates where a product of two values sums over an axis, as query times key does over the head dimension.

    scores = q k'     ->     scores = (q * gate) k'          gate = ones (size of the dimension,)

Removing index i there takes one summand out, for which the weights that make q and k are both responsible: counted at
each, it would count twice. The derivative by the gate is that of the summand, once, whatever stands between weights and
product (biases, rotations, norms).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.axes.groups import Group
from graphopt.axes.layout import Layout, leaves
from graphopt.axes.rules.contraction import parse_equation
from graphopt.ir.graph import arguments, copy_graph_module
from graphopt.passes.pruning.index_rows import by_index
from graphopt.passes.pruning.operations import FACTORS
from graphopt.passes.pruning.standing import Standing

aten = torch.ops.aten
_PRODUCTS = {**FACTORS, aten.scaled_dot_product_attention: ("query", "key")}


@dataclass(frozen=True)
class UnitGate:
    """Ones that a dimension of an operand is multiplied with.

    Attributes:
        name: of the parameter, (size of the dimension,).
        layout: of the dimension.
    """

    name: str
    layout: Layout

    def by_index(self, values: torch.Tensor, axis: int, standing: Standing) -> torch.Tensor:
        """Sum over what each index owns in something of the shape of the gate, (indices left,)."""
        return by_index(values.flatten(), 0, self.layout, axis, standing.kept)


def gated(standing: Standing, groups: Sequence[Group]) -> tuple[fx.GraphModule, dict[int, list[UnitGate]]]:
    """Return a copy of the program as it is now with a gate in every product that sums over an axis of a group.

    Returns:
        The graph, which is only to be run, and the gates by axis.
    """
    gm = copy_graph_module(standing.program.graph_module)
    twins = dict(zip(standing.program.graph.nodes, list(gm.graph.nodes), strict=True))
    wanted = {group.axis for group in groups}
    found: dict[int, list[UnitGate]] = {}
    count = 0
    for call, twin in twins.items():
        for operand, dim in _summed(call, standing):
            layout = standing.static_layout(operand, dim)
            axes = () if layout is None else sorted({leaf.id for leaf in leaves(layout)} & wanted)
            if layout is None or not axes or not operand.meta["val"].is_floating_point():
                continue
            gate = UnitGate(f"_gate_{count}", layout)
            count += 1
            _insert(gm, gate, operand.meta["val"], dim, twins[operand], twin)
            for axis in axes:
                found.setdefault(axis, []).append(gate)
    gm.recompile()
    return gm, found


def _summed(call: fx.Node, standing: Standing) -> Iterator[tuple[fx.Node, int]]:
    """Yield an operand and its dimension for each sum over a product of two values that depend on the inputs."""
    packet = getattr(call.target, "overloadpacket", None)
    if packet in _PRODUCTS:
        given = arguments(call, ())
        first, second = (given[name] for name in _PRODUCTS[packet])
        if not standing.is_constant(first) and not standing.is_constant(second):
            yield first, first.meta["val"].dim() - 1
    elif packet is aten.einsum:
        yield from _summed_by_einsum(arguments(call, ()), standing)


def _summed_by_einsum(given: dict[str, Any], standing: Standing) -> Iterator[tuple[fx.Node, int]]:
    tensors = given["tensors"]
    terms, result = parse_equation(given["equation"], [node.meta["val"].dim() for node in tensors])
    values = [(node, term) for node, term in zip(tensors, terms, strict=True) if not standing.is_constant(node)]
    for label in dict.fromkeys(label for _, term in values for label in term):
        holders = [(node, term.index(label)) for node, term in values if label in term]
        if label not in result and len(holders) > 1:
            yield holders[0]


def _insert(gm: fx.GraphModule, gate: UnitGate, value: torch.Tensor, dim: int, operand: fx.Node, call: fx.Node) -> None:
    """Multiply an operand of a call with a new gate, where it is read first: both may be the same value."""
    ones = torch.ones(int(value.shape[dim]), *[1] * (value.dim() - dim - 1), dtype=value.dtype, device=value.device)
    gm.register_parameter(gate.name, torch.nn.Parameter(ones))
    with gm.graph.inserting_before(call):
        product = gm.graph.call_function(aten.mul.Tensor, (operand, gm.graph.get_attr(gate.name)))
    once = iter((product,))
    call.args = fx.map_arg(call.args, lambda read: next(once, read) if read is operand else read)
    call.kwargs = fx.map_arg(call.kwargs, lambda read: next(once, read) if read is operand else read)
