"""What adds 0 or multiplies by 1, exactly, as the Identity that it is, but for the sign of 0.

Given:   Add(x, 0)   Sub(x, 0)   Mul(x, 1)   Div(x, 1)        by a number, not a tensor that x is broadcast with
Result:  Identity(x)
"""

from __future__ import annotations

import onnx_ir as ir

_NEUTRAL = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1}
_EITHER_SIDE = ("Add", "Mul")


class NoOpsPass(ir.passes.InPlacePass):
    """Rewrite every graph of the model."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite; `modified` says whether there was one."""
        modified = False
        for node in list(model.graph.all_nodes()):
            kept = _kept(node)
            if kept is not None and node.graph is not None:
                same = ir.node("Identity", [kept], metadata_props=dict(node.metadata_props))
                same.outputs[0].type, same.outputs[0].shape = kept.type, kept.shape
                ir.convenience.replace_nodes_and_values(
                    node.graph, node, [node], [same], [node.outputs[0]], [same.outputs[0]]
                )
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _kept(node: ir.Node) -> ir.Value | None:
    """Return the operand that a node hands on, None if it changes it."""
    if node.domain != "" or node.op_type not in _NEUTRAL:
        return None
    one, other = node.inputs
    if _is(other, _NEUTRAL[node.op_type]):
        return one
    return other if node.op_type in _EITHER_SIDE and _is(one, _NEUTRAL[node.op_type]) else None


def _is(value: ir.Value | None, number: int) -> bool:
    constant = None if value is None else ir.convenience.get_const_tensor(value)
    return constant is not None and not constant.shape.dims and bool(constant.numpy() == number)
