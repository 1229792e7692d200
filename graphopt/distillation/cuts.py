"""Cut points: values that everything a network has learned passes through, found as graph dominators.

A value is a cut point of an output if every path from the network's first learned operators to that output runs
through it: the dominators of the output. Only values that depend on an input *and* on a parameter count, and only
through what they hold, not through their size; so an attention mask or a position that reaches every layer from
outside opens no way around a block.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx
import torch
from torch import fx

from graphopt.distillation.addresses import Tap, Tappable, addresses
from graphopt.distillation.taps import output_values
from graphopt.ir.graph import constant
from graphopt.ir.operators import (
    ALL_CONVOLUTIONS,
    CARRYING,
    DRAWN_LIKE,
    EMBEDDINGS,
    FILLED_LIKE,
    PRODUCTS,
    RECURRENT,
    SIZES,
    UNINITIALISED,
)
from graphopt.ir.program import Program
from graphopt.ir.torch_internals import pytree

# The result depends on the size of the input only.
_SIZE_ONLY = FILLED_LIKE | DRAWN_LIKE | UNINITIALISED | SIZES

# A weight meets an activation: the start of a layer.
WEIGHTED = PRODUCTS | ALL_CONVOLUTIONS | RECURRENT | EMBEDDINGS

_SOURCE = "source"  # stands before the first learned operators


@dataclass(frozen=True)
class Flow:
    """What a program's values depend on.

    Attributes:
        graph: an edge wherever one learned value is computed from another; `_SOURCE` leads to the first ones.
        chains: for each output, its cut points from first to last.
    """

    graph: nx.DiGraph[fx.Node | str]
    chains: tuple[tuple[fx.Node, ...], ...]


def flow(program: Program) -> Flow:
    """Find the learned values of `program` and the cut points of each of its own outputs."""
    graph = _learned(program)
    dominator = nx.immediate_dominators(graph, _SOURCE)
    chains = []
    for output in output_values(program):
        chain: list[fx.Node] = []
        current: fx.Node | str = output
        while current in dominator and isinstance(current, fx.Node):
            chain.append(current)
            current = dominator[current]
        chains.append(tuple(reversed(chain)))
    return Flow(graph, tuple(chains))


def residual_points(program: Program) -> list[fx.Node]:
    """Return the values at block boundaries: where branches have joined again, in graph order.

    After a join the straight run of calls that follow is walked as long as the shape stays the same: past the
    ReLU after a residual add, past the LayerNorm of a post-norm transformer. A network without branches gives
    what enters each of its layers but the first. Values that are outputs anyway, and those that are written to
    later, are left out.
    """
    return _points(program, _layer_inputs)


def auto_taps(program: Program, limit: int) -> list[Tap]:
    """Return at most `limit` block boundaries, evenly spread, the last always among them."""
    points = residual_points(program)
    count = min(limit, len(points))
    chosen = [points[(index + 1) * len(points) // count - 1] for index in range(count)]
    canonical = {node: address for address, node in addresses(program).items()}
    return [Tap(canonical[point.name], point.name) for point in chosen]


def stage_ends(program: Program) -> list[fx.Node]:
    """Return the last block boundary before every change of spatial size, and the last of all."""
    points = _points(program, _layer_inputs_and_pooled)
    return [
        point
        for index, point in enumerate(points)
        if index + 1 == len(points) or spatial_size(point) != spatial_size(points[index + 1])
    ]


def _points(program: Program, of_a_chain: Callable[[Sequence[fx.Node]], list[fx.Node]]) -> list[fx.Node]:
    """Return joins, and of an output without any what `of_a_chain` says."""
    found = flow(program)
    outputs = set(output_values(program))
    points = [point for chain in found.chains for point in (_joins(found.graph, chain, outputs) or of_a_chain(chain))]
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    tappable = Tappable(program.graph)
    usable = [point for point in dict.fromkeys(points) if point not in outputs and not tappable.why_not(point)]
    return sorted(usable, key=order.__getitem__)


def _learned(program: Program) -> nx.DiGraph[fx.Node | str]:
    graph: nx.DiGraph[fx.Node | str] = nx.DiGraph()
    graph.add_node(_SOURCE)
    from_input: set[fx.Node] = set()
    from_weight: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            from_input.add(node)
        elif node.op == "get_attr" and isinstance(constant(node, program.graph_module), torch.nn.Parameter):
            from_weight.add(node)
        elif node.op == "call_function" and _holds_tensors(node) and node not in _SIZE_ONLY:
            sources = node.all_input_nodes
            from_input.update([node] if any(source in from_input for source in sources) else [])
            from_weight.update([node] if any(source in from_weight for source in sources) else [])
            if node in from_input and node in from_weight:
                before = [source for source in sources if source in graph]
                graph.add_edges_from((source, node) for source in before or [_SOURCE])
    return graph


def _holds_tensors(node: fx.Node) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(node.meta.get("val")))


def _joins(graph: nx.DiGraph[fx.Node | str], chain: Sequence[fx.Node], outputs: Container[fx.Node]) -> list[fx.Node]:
    points: list[fx.Node] = []
    open_run = False
    for node in chain[1:]:
        if graph.in_degree(node) > 1:
            points.append(node)
            open_run = True
        elif open_run and node not in outputs and _same_shape(node, points[-1]):
            # a tap is named after the operator that computed it
            points[-1] = points[-1] if node in CARRYING else node
        else:
            open_run = False
    return points


def _layer_inputs(chain: Sequence[fx.Node]) -> list[fx.Node]:
    return [before for before, node in pairwise(chain) if node in WEIGHTED]


def _layer_inputs_and_pooled(chain: Sequence[fx.Node]) -> list[fx.Node]:
    """Return what enters layers, and what pooling makes smaller: the last of its size."""
    pairs = [*pairwise(chain)]
    return [before for before, node in pairs if node in WEIGHTED or spatial_size(before) != spatial_size(node)]


def _same_shape(one: fx.Node, other: fx.Node) -> bool:
    a, b = one.meta["val"], other.meta["val"]
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and tuple(a.shape) == tuple(b.shape)


def spatial_size(node: fx.Node) -> tuple[int | torch.SymInt, ...]:
    """Return the height and width of what a node computes, nothing where it has none or both are 1."""
    value = node.meta["val"]
    sized = isinstance(value, torch.Tensor) and value.dim() == 4 and tuple(value.shape[2:]) != (1, 1)
    return tuple(value.shape[2:]) if sized else ()
