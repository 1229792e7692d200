"""What no input of a program can change: its parameters, buffers and constants, and what is made of them alone.

weight = 2 * parameter        fixed: the shape is that of every call
mask = ones(sym_size(x, 0))   not fixed
"""

from __future__ import annotations

import contextlib
import operator
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.errors import CaptureError, first_line
from graphopt.ir.aliasing import sharing_memory
from graphopt.ir.graph import constant
from graphopt.ir.operators import writes_in_place
from graphopt.ir.regions import regions
from graphopt.ir.torch_internals import OpOverload


class FixedValues:
    """What no input of one graph changes.

    Args:
        gm: the graph's module.
        values: of its inputs, for the body of a region: those that are fixed outside.
        resized: whether a call may change the sizes of tensors, so that nothing is fixed.
    """

    def __init__(self, gm: fx.GraphModule, values: Mapping[fx.Node, Tensor], *, resized: bool) -> None:
        self.gm = gm
        self._values: dict[fx.Node, Any] = {}
        self._made: dict[fx.Node, None] = {}  # by calls, in the graph's order; none has been run
        if resized:
            return
        self._values.update(values)
        for node in gm.graph.nodes:
            read = constant(node, gm)
            if read is not None:
                self._values[node] = read
            elif _computes(node) and all(used in self._values or used in self._made for used in node.all_input_nodes):
                self._made[node] = None

    def shape(self, node: Any) -> tuple[int, ...] | None:
        """Return the shape that a node always has, None where inputs may change it."""
        value = self.value(node)
        return tuple(value.shape) if isinstance(value, Tensor) else None

    def value(self, node: Any) -> Any:
        """Return what a node always gives, None where inputs may change it. The calls that make it are run."""
        if not isinstance(node, fx.Node) or not (node in self._values or node in self._made):
            return None
        needed, waiting = {node}, [node]
        while waiting:
            for used in waiting.pop().all_input_nodes:
                if used not in needed and used not in self._values:
                    needed.add(used)
                    waiting.append(used)
        with torch.no_grad():
            for made in [made for made in self._made if made in needed and made not in self._values]:
                args, kwargs = fx.map_arg((made.args, made.kwargs), self._values.__getitem__)
                self._values[made] = made.target(*args, **kwargs)  # type: ignore[operator]
        return self._values[node]


def _computes(node: fx.Node) -> bool:
    """Whether a call makes something of tensors, and nothing else."""
    plain = isinstance(node.target, OpOverload) and not writes_in_place(node)
    return bool(node.all_input_nodes) and (plain or node.target is operator.getitem)


def _resizes(node: fx.Node, *, inside: bool) -> bool:
    """Whether a call may change the shape of a tensor that others hold: of `out=`, or by `transpose_` of a parameter.

    Args:
        node: any node.
        inside: it is in a body, whose inputs are tensors of the graph around it.
    """
    if not isinstance(node.target, OpOverload):
        return False
    if any(argument.is_out for argument in node.target._schema.arguments):
        return True
    held = ("get_attr", "placeholder") if inside else ("get_attr",)
    return torch.Tag.inplace_view in node.target.tags and any(
        shared.op in held for used in node.all_input_nodes for shared in sharing_memory(used)
    )


def fixed_values(gm: fx.GraphModule) -> Iterator[FixedValues]:
    """Yield what is fixed in a graph, and then in the bodies in it, each once.

    What a graph hands to the bodies in it is only computed when the next is asked for.

    Raises:
        CaptureError: a region lacks its body, or hands it more or less than it takes.
    """
    modules = [module for module in gm.modules() if isinstance(module, fx.GraphModule)]
    with _whole():
        inside = {module: list(regions(module)) for module in modules}
    uses = Counter(body for found in inside.values() for region in found for body in region.bodies)
    values: dict[fx.GraphModule, dict[fx.Node, Tensor]] = {module: {} for module in modules}
    resized = any(_resizes(node, inside=module is not gm) for module in modules for node in module.graph.nodes)
    for module in modules:  # those that hold others come first
        fixed = FixedValues(module, values[module], resized=resized)
        yield fixed
        for region in inside[module]:
            for body in [body for body in region.bodies if uses[body] == 1]:
                inputs = [node for node in body.graph.nodes if node.op == "placeholder"]
                with _whole():
                    handed = [*zip(inputs, region.operands, strict=True)]
                for at, (inner, operand) in enumerate(handed):
                    value = None if at < region.state or region.sliced(at) else fixed.value(operand)
                    if isinstance(value, Tensor):
                        values[body][inner] = value


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    try:
        yield
    except (AttributeError, IndexError, TypeError, ValueError) as err:
        raise CaptureError(f"The model holds a region that is not whole ({first_line(err)}). Export it again.") from err
