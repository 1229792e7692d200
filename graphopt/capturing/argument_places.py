"""Arguments stand where the schema of an operator has them: what looks for the first one finds it.

relu(self=x)                    relu(x)
transpose(x, dim1=2, dim0=1)    transpose(x, 1, 2)
"""

from __future__ import annotations

from torch import fx

from graphopt.errors import CaptureError
from graphopt.ir.graph import arguments
from graphopt.ir.regions import every_graph_module
from graphopt.ir.torch_internals import OpOverload


def place_arguments(gm: fx.GraphModule) -> None:
    """Put the arguments of all calls in their places, in place, in the bodies of regions too.

    Raises:
        CaptureError: a call lacks one.
    """
    for body in every_graph_module(gm):
        for node in body.graph.nodes:
            if isinstance(node.target, OpOverload):
                _place(node)


def _place(node: fx.Node) -> None:
    schema = node.target._schema  # type: ignore[union-attr]
    given = arguments(node, ())
    missing = next((argument.name for argument in schema.arguments if argument.name not in given), "")
    if missing:
        raise CaptureError(f"The model calls `{node.target}` without its `{missing}`. Export it again.")
    names = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    named = [place for place, name in enumerate(names) if place >= len(node.args) and name in node.kwargs]
    if named:
        node.args = tuple(given[name] for name in names[: named[-1] + 1])
        node.kwargs = {name: value for name, value in node.kwargs.items() if name not in names}
