"""Integer divisions by -1, which end the process where the smallest integer is divided (torch 2.13, ONNX Runtime 1.27).

div(x, y, "trunc")     m = y == -1; q = div(x, masked_fill(y, m, 1), "trunc"); where(m, -q, q)
remainder(x, y)        remainder(x, masked_fill(y, y == -1, 1)), since 1 leaves as little as -1
"""

from __future__ import annotations

import torch
from torch import fx

from graphopt.ir.editor import Editor
from graphopt.ir.graph import arguments
from graphopt.ir.operators import Family, functional_twin, writes_in_place
from graphopt.ir.training import set_argument

aten = torch.ops.aten
_QUOTIENTS = Family("div", "floor_divide")
_REMAINDERS = Family("remainder", "fmod")


def truncates(node: fx.Node) -> bool:
    """Whether a call is a division rounded towards zero."""
    return node in _QUOTIENTS and arguments(node, ()).get("rounding_mode") == "trunc"


def divides_integers(node: fx.Node) -> bool:
    """Whether a call divides integers and returns some."""
    value = node.meta.get("val") if node in _QUOTIENTS or node in _REMAINDERS else None
    return isinstance(value, torch.Tensor) and not value.is_floating_point() and value.dtype != torch.bool


def spare_minus_one(node: fx.Node, editor: Editor) -> fx.Node | None:
    """Return what gives the same as a division and divides nothing by -1; None where it is such a division itself.

    Use inside `with editor.graph.inserting_before(node):`.
    """
    divisor = arguments(node, ("other",))["other"]
    minus: fx.Node | None = None
    if isinstance(divisor, fx.Node):
        if _is_spared(divisor):
            return None
        minus = editor.call(aten.eq.Scalar, divisor, -1, like=node)
        divisor = editor.call(aten.masked_fill.Scalar, divisor, minus, 1, like=node)
    elif divisor == -1:
        divisor = 1
    else:
        return None
    result = editor.graph.node_copy(node)
    result.target = functional_twin(node.target) or node.target
    result.meta = dict(node.meta)
    set_argument(result, "other", divisor)
    editor.propagate(result)
    if node in _QUOTIENTS:
        opposite = editor.call(aten.neg.default, result, like=node)
        result = opposite if minus is None else editor.call(aten.where.self, minus, opposite, result, like=node)
    return editor.call(aten.copy_.default, node.args[0], result, like=node) if writes_in_place(node) else result


def _is_spared(divisor: fx.Node) -> bool:
    minus = divisor.args[1] if divisor.target is aten.masked_fill.Scalar and len(divisor.args) == 3 else None
    return isinstance(minus, fx.Node) and minus.target is aten.eq.Scalar and minus.args == (divisor.args[0], -1)
