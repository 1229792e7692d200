"""Regions: higher-order calls, whose bodies are graphs of their own, and how values flow in and out of them.

    branches   cond(condition, then, else, operands)              one of the bodies runs
    loop       while_loop(condition, body, state, constants)      the body's results are the next state
    scan       scan(body, state, sequences, constants)            likewise, and it sees one slice of each sequence a
               map_impl(body, sequences, constants)               time; further results are stacked
    block      wrap_with_autocast(.., body, *operands)            the body runs once

The inputs of every body are the region's operands in order: state, sequences, constants. What a region computes is
its state, then what is stacked; of branches and blocks: what the bodies return.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from graphopt.ir.torch_internals import HigherOrderOperator, compiler_settings

Form = Literal["branches", "loop", "scan", "block"]


@dataclass(frozen=True, eq=False)
class Region:
    """One call of a higher-order operator.

    Attributes:
        node: the call.
        form: how often which body runs, see the module's table.
        bodies: the graphs that run; of a loop: its condition, then its body.
        reads: the nodes that read them.
        operands: what flows into every body, one for each of its placeholders: nodes or numbers.
        state: how many operands, the first ones, a body's first results replace in the next round.
        sequences: how many operands after these are handed in one slice along their first dimension at a time.
    """

    node: fx.Node
    form: Form
    bodies: tuple[fx.GraphModule, ...]
    reads: tuple[fx.Node, ...]
    operands: tuple[Any, ...]
    state: int = 0
    sequences: int = 0

    @property
    def main(self) -> fx.GraphModule:
        """The body whose results the call returns; of branches the first."""
        return self.bodies[1] if self.form == "loop" else self.bodies[0]

    def sliced(self, position: int) -> bool:
        """Tell whether an operand is handed in one slice at a time."""
        return self.state <= position < self.state + self.sequences

    def stacked(self, position: int) -> bool:
        """Tell whether a result is made of one slice for each round."""
        return self.form == "scan" and position >= self.state

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Return what the bodies run under."""
        if self.form != "block":
            return contextlib.nullcontext()
        device, dtype, enabled, cached, *_ = self.node.args
        return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cached)  # type: ignore[arg-type]


def region(node: fx.Node, gm: fx.GraphModule) -> Region | None:
    """Describe a call of a higher-order operator; None for any other node and for operators that are not known.

    Args:
        node: a node of the graph of `gm`.
        gm: holds the bodies.
    """
    name = node.target.__name__ if isinstance(node.target, HigherOrderOperator) else ""
    args: Any = node.args
    if name == "cond":
        form, reads, operands, state, sequences = "branches", args[1:3], args[3], 0, 0
    elif name == "while_loop":
        form, reads, operands, state, sequences = "loop", args[:2], (*args[2], *args[3]), len(args[2]), 0
    elif name == "scan":
        form, reads, operands, state, sequences = "scan", args[:1], (*args[1], *args[2], *args[3]), *map(len, args[1:3])
    elif name == "map_impl":
        form, reads, operands, state, sequences = "scan", args[:1], (*args[1], *args[2]), 0, len(args[1])
    elif name == "wrap_with_autocast":
        form, reads, operands, state, sequences = "block", args[4:5], args[5:], 0, 0
    else:
        return None
    bodies = tuple(operator.attrgetter(str(read.target))(gm) for read in reads)
    return Region(node, form, bodies, tuple(reads), tuple(operands), state, sequences)  # type: ignore[arg-type]


def regions(gm: fx.GraphModule) -> Iterator[Region]:
    """Yield the regions of a graph in order, without those inside them."""
    for node in gm.graph.nodes:
        found = region(node, gm)
        if found is not None:
            yield found


def graph_modules(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """Yield a graph module and the bodies of its regions, at any depth, each once."""
    pending, seen = [gm], {id(gm): None}
    while pending:
        current = pending.pop()
        yield current
        for body in [body for found in regions(current) for body in found.bodies]:
            if id(body) not in seen:
                seen[id(body)] = None
                pending.append(body)


def every_graph_module(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """List a graph module and those that it holds, be they bodies of regions that are known or not."""
    return [module for module in gm.modules() if isinstance(module, fx.GraphModule)]


@contextlib.contextmanager
def compiled_for_their_shapes() -> Iterator[None]:
    """Let torch compile the regions of models that run meanwhile for the shapes at hand, as often as there are others.

    It compiles them even in eager mode, all by way of one function, and so takes sizes that varied between the regions
    of other models for dynamic: whether a model runs would hang on what ran before it (torch 2.13). The regions of a
    program are operators with graphs of their own, which run as they are.
    """
    often = 1 << 16
    with compiler_settings(automatic_dynamic_shapes=False, recompile_limit=often, accumulated_recompile_limit=often):
        yield


def inside(found: Region) -> list[fx.Node]:
    """Return the nodes of the bodies of a region, at any depth."""
    return [node for body in found.bodies for module in graph_modules(body) for node in module.graph.nodes]


def inputs(body: fx.GraphModule) -> list[fx.Node]:
    """Return the placeholders of a body."""
    return [node for node in body.graph.nodes if node.op == "placeholder"]


def results(body: fx.GraphModule) -> list[Any]:
    """Return what a body returns, flat: nodes or numbers."""
    output = next(node for node in reversed(body.graph.nodes) if node.op == "output")
    returned = output.args[0]
    return list(returned) if isinstance(returned, list | tuple) else [returned]
