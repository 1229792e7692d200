"""Which layers of the user's model a quantization stands between: names of the graph's own say nothing to a user."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from graphopt.ir.program import Program
from graphopt.ir.provenance import module_path, origin
from graphopt.quantization.ops import DEQUANTIZE


def value_quantized(program: Program, quantize: str) -> str:
    """Say in words whose result a quantize node rounds."""
    value = _node(program, quantize).args[0]
    assert isinstance(value, fx.Node)  # what is quantized is computed or an input
    return f"input `{value.name}`" if value.op == "placeholder" else value_computed(program, value.name)


def value_computed(program: Program, name: str) -> str:
    """Say in words whose result a node computes."""
    value = _node(program, name)
    known = origin(value)
    where = f" of `{path}`" if (path := module_path(value)) else ""
    return f"the result of `{known.op if known is not None and known.op else value.name}`{where}"


def skip_around(program: Program, quantize: str) -> str:
    """Return the value of `skip` that leaves float what computes the value of a quantize node and what reads it."""
    node = _node(program, quantize)
    found = [*(source for source in node.all_input_nodes[:1]), *_readers(node)]
    names = [module_path(other) or _captured(other) for other in found if other.op == "call_function"]
    return "+".join(dict.fromkeys(names))


def _node(program: Program, name: str) -> fx.Node:
    found: fx.Node = next(node for node in program.graph.nodes if node.name == name)
    return found


def _captured(node: fx.Node) -> str:
    known = origin(node)
    return known.node if known is not None else node.name


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Yield what computes on the integers of `node`; up to where they are dequantized, calls move them."""
    for user in node.users:
        if node.target is DEQUANTIZE:
            yield user
        elif user.op == "call_function":
            yield from _readers(user)
