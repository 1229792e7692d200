"""Shapes that no input of a program can change: of its parameters, buffers and constants, and of what is made of them.

weight = mul(parameter, 2)        the parameter's, in every call
mask = ones(sym_size(x, 0))       not fixed

No call turns a tensor in place (`turned_in_place`), so shapes follow from shapes. Nothing of the program is run, but
operators of a short list, on tensors without memory.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.errors import CaptureError, first_line, foreign_code
from graphopt.ir.graph import constant
from graphopt.ir.operators import (
    ACTIVATIONS,
    CASTS,
    COPIES,
    DIVISIONS,
    DROPOUTS,
    MULTIPLICATIONS,
    REORDERS,
    RESHAPES,
    SUMS,
    Family,
    short_name,
)
from graphopt.ir.regions import Region, every_graph_module, regions
from graphopt.ir.regions import inputs as body_inputs
from graphopt.ir.torch_internals import OpOverload

_QUANTIZERS = Family("graphopt::quantize", "graphopt::dequantize", "graphopt::fake_quantize", "graphopt::unpack")
_OF_FIRST = COPIES | CASTS | DROPOUTS | ACTIVATIONS | Family("_weight_norm")  # shaped as that is
_OTHERS = MULTIPLICATIONS | DIVISIONS | SUMS | REORDERS | RESHAPES | _QUANTIZERS | Family("cat")


class FixedShapes:
    """Shapes that no input of one graph changes.

    Args:
        gm: the graph's module.
        inputs: tensors without memory for those of its inputs whose shapes are fixed outside, for the body of a region.
    """

    def __init__(self, gm: fx.GraphModule, inputs: Mapping[fx.Node, Tensor]) -> None:
        self.gm = gm
        self._known: dict[fx.Node, Tensor] = dict(inputs)
        for node in gm.graph.nodes:
            read = constant(node, gm)
            if read is not None:
                self._known[node] = torch.empty(read.shape, dtype=read.dtype, device="meta")
            elif node in _OF_FIRST or node in _OTHERS:
                self._follow(node)

    def of(self, node: Any) -> tuple[int, ...] | None:
        """Return the shape that a node always has, None where inputs may change it."""
        known = self.tensor(node)
        return None if known is None else tuple(known.shape)

    def tensor(self, node: Any) -> Tensor | None:
        """Return a tensor without memory of the shape that a node always has, None where inputs may change it."""
        return self._known.get(node) if isinstance(node, fx.Node) else None

    def _follow(self, node: fx.Node) -> None:
        if not isinstance(node.target, OpOverload) or node.target._schema.is_mutable or not node.args:
            return
        if not node.all_input_nodes or any(used not in self._known for used in node.all_input_nodes):
            return
        if node in _OF_FIRST:
            known = self.tensor(node.args[0])
            if known is not None:
                self._known[node] = known
            return
        refused = foreign_code(
            lambda said, _: CaptureError(f"The model calls `{short_name(node)}` on what it does not take ({said}).")
        )
        with torch.no_grad(), refused:
            args, kwargs = fx.map_arg((node.args, node.kwargs), self._known.__getitem__)
            self._known[node] = node.target(*args, **kwargs)


def fixed_shapes(gm: fx.GraphModule) -> Iterator[FixedShapes]:
    """Yield what is fixed in a graph, and then in the bodies in it, each once.

    Raises:
        CaptureError: a region lacks its body, or hands it more or less than it takes.
    """
    modules = every_graph_module(gm)
    inside = {module: _whole_regions(module) for module in modules}
    calls = Counter(body for module in modules for body in _called(module))
    inputs: dict[fx.GraphModule, dict[fx.Node, Tensor]] = {module: {} for module in modules}
    for module in modules:  # what calls a body comes before it, or its inputs count as changing
        fixed = FixedShapes(module, inputs[module])
        yield fixed
        for region in inside[module]:
            for body in [body for body in region.bodies if calls[body] == 1]:
                for at, (inner, operand) in enumerate(zip(body_inputs(body), region.operands, strict=True)):
                    known = None if at < region.state or region.sliced(at) else fixed.tensor(operand)
                    if known is not None:
                        inputs[body][inner] = known


def _called(gm: fx.GraphModule) -> Iterator[Any]:
    """Yield the bodies that the calls of a graph are handed, once for every call."""
    for node in gm.graph.nodes:
        held = operator.attrgetter(str(node.target))(gm) if node.op == "get_attr" else None
        if isinstance(held, fx.GraphModule):
            yield from [held] * len(node.users)


def _gradient_blocks(gm: fx.GraphModule) -> Iterator[Region]:
    """Yield what runs with gradients on or off as regions; normal form has none of them."""
    for node in gm.graph.nodes:
        if getattr(node.target, "__name__", "") == "wrap_with_set_grad_enabled":
            _, read, *operands = node.args
            yield Region(node, "block", (operator.attrgetter(str(read.target))(gm),), (read,), tuple(operands))


def _whole_regions(gm: fx.GraphModule) -> list[Region]:
    try:
        found = [*regions(gm), *_gradient_blocks(gm)]
        for region in found:
            for body in region.bodies:
                list(zip(body_inputs(body), region.operands, strict=True))
    except (AttributeError, IndexError, TypeError, ValueError) as err:
        raise CaptureError(f"The model holds a region that is not whole ({first_line(err)}). Export it again.") from err
    return found
