"""Calls whose operands torch brings to one type by itself, and the exporter does not (torch 2.13).

clamp(x, 0, 6.0)         clamp(x, 0.0, 6.0)             it finds no operator for bounds of two types
rsub(i, 1.0)             rsub(to(i, float32), 1.0)      it computes 1.0 - i in integers
index(x, [i])            index(x, [to(i, int64)])       of int32 it writes what no runtime takes
add, mul of booleans     logical_or, logical_and        likewise
"""

from __future__ import annotations

import torch
from torch import fx

from graphopt.ir.editor import Editor
from graphopt.ir.graph import arguments

aten = torch.ops.aten
_BOOLEAN = {aten.add.Tensor: aten.logical_or.default, aten.mul.Tensor: aten.logical_and.default}
_INDEXES = (aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default)


def promoted(node: fx.Node, editor: Editor) -> fx.Node | None:
    """Return a call with operands of one type in place of another, None where that has such or was changed in place."""
    if node.target is aten.clamp.default:
        given = arguments(node, ("self", "min", "max"))
        bounds = [given[name] for name in ("min", "max")]
        if sorted(map(type, bounds), key=str) == [float, int]:
            return editor.call(node.target, given["self"], *map(float, bounds), like=node)
    if node.target is aten.rsub.Scalar and _type_of(node.args[0]) is not _type_of(node):
        widened = editor.call(aten.to.dtype, node.args[0], _type_of(node), like=node)
        return editor.call(node.target, widened, *node.args[1:], like=node)
    if node.target in _BOOLEAN and _are_booleans(node):
        return editor.call(_BOOLEAN[node.target], *node.args[:2], like=node)
    if node.target in _INDEXES:
        indices = [
            editor.call(aten.to.dtype, index, torch.int64, like=node) if _type_of(index) is torch.int32 else index
            for index in node.args[1]  # type: ignore[union-attr]
        ]
        node.update_arg(1, indices)
    return None


def _are_booleans(node: fx.Node) -> bool:
    plain = len(node.args) == 2 and not node.kwargs  # `alpha` may say that the second counts for nothing
    return plain and all(_type_of(operand) is torch.bool for operand in node.args)


def _type_of(operand: object) -> torch.dtype | None:
    value = operand.meta.get("val") if isinstance(operand, fx.Node) else None
    return value.dtype if isinstance(value, torch.Tensor) else None
