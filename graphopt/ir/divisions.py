"""Integer divisions by -1, which end the process where the smallest integer is divided (torch 2.13, ONNX Runtime 1.31).

torch does so where it rounds towards zero. `rounded_towards_zero`, by what is recorded of the result:

div(x, y, "trunc") of integers    floor_divide(x - fmod(x, y), y)
div(x, y, "trunc") of floats      div(x.to(float), y, "trunc"), floats whatever a stranger's file says of x

ONNX Runtime does so in all. `divided_without_minus_one`:

floor_divide(x, y)                m = y == -1; q = floor_divide(x, masked_fill(y, m, 1)); where(m, -q, q)
remainder(x, y)                   remainder(x, masked_fill(y, y == -1, 1)), since 1 leaves as little as -1
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.ir.editor import Editor
from graphopt.ir.graph import arguments
from graphopt.ir.operators import Family, functional_twin, writes_in_place
from graphopt.ir.training import set_argument

aten = torch.ops.aten
_QUOTIENTS = Family("div", "floor_divide")
_REMAINDERS = Family("remainder", "fmod")


def rounds_towards_zero(node: fx.Node) -> bool:
    """Whether a call is a division that rounds so, and none that was made safe."""
    if node not in _QUOTIENTS:
        return False
    given = arguments(node, ())
    return given.get("rounding_mode") == "trunc" and not _is_cast(given["self"], node.meta.get("val"))


def _is_cast(x: Any, value: Any) -> bool:
    """Whether a dividend is the result's floating type, by a call that makes it so."""
    cast = isinstance(x, fx.Node) and x.target is aten.to.dtype and isinstance(value, torch.Tensor)
    return cast and value.is_floating_point() and x.args[1:] == (value.dtype,)


def rounded_towards_zero(node: fx.Node, editor: Editor) -> fx.Node:
    """Return what gives the same as a division that rounds towards zero and ends no process.

    Use inside `with editor.graph.inserting_before(node):`.
    """
    given = arguments(node, ("self", "other"))
    x, y = given["self"], given["other"]
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        floats = editor.call(aten.to.dtype, x, value.dtype, like=node)
        target = functional_twin(node.target) or node.target
        result = editor.call(target, floats, y, like=node, rounding_mode="trunc")  # type: ignore[arg-type]
    else:
        result = integer_quotient(x, y, editor, node)
    return editor.call(aten.copy_.default, x, result, like=node) if writes_in_place(node) else result


def integer_quotient(x: fx.Node, y: Any, editor: Editor, like: fx.Node) -> fx.Node:
    """Divide integers and round towards zero, by an operator that rounds down."""
    tensor = isinstance(y, fx.Node)
    rest = editor.call(aten.fmod.Tensor if tensor else aten.fmod.Scalar, x, y, like=like)
    whole = editor.call(aten.sub.Tensor, x, rest, like=like)
    return editor.call(aten.floor_divide.default if tensor else aten.floor_divide.Scalar, whole, y, like=like)


def divides_integers(node: fx.Node) -> bool:
    """Whether a call divides integers and returns some."""
    value = node.meta.get("val") if node in _QUOTIENTS or node in _REMAINDERS else None
    return isinstance(value, torch.Tensor) and not value.is_floating_point() and value.dtype != torch.bool


def divided_without_minus_one(node: fx.Node, editor: Editor) -> fx.Node | None:
    """Return what gives the same as a division of integers and divides nothing by -1; None where nothing is.

    Use inside `with editor.graph.inserting_before(node):`, where what is recorded of values is true.
    """
    divisor = arguments(node, ("other",))["other"]
    minus: fx.Node | None = None
    if isinstance(divisor, fx.Node):
        common = node.meta["val"].dtype
        if not isinstance(divisor.meta["val"], torch.Tensor):  # a size
            divisor = editor.call(aten.scalar_tensor.default, divisor, like=node, dtype=common)
        elif divisor.meta["val"].dtype != common:  # what is -1 there may be another number before
            divisor = editor.call(aten.to.dtype, divisor, common, like=node)
        minus = editor.call(aten.eq.Scalar, divisor, -1, like=node)
        divisor = editor.call(aten.masked_fill.Scalar, divisor, minus, 1, like=node)
    elif divisor == -1:
        divisor = 1
    else:
        return None
    result = editor.graph.node_copy(node)
    result.meta = dict(node.meta)
    set_argument(result, "other", divisor)
    editor.propagate(result)
    if node in _REMAINDERS:
        return result
    opposite = editor.call(aten.neg.default, result, like=node)
    return opposite if minus is None else editor.call(aten.where.self, minus, opposite, result, like=node)
