"""Drop Relu and Clip in front of a QuantizeLinear that saturates at the same place anyway.

Given:   QuantizeLinear(Relu(x), scale, zero_point=0: uint8)
Result:  QuantizeLinear(x, scale, zero_point)

Runtimes fuse an operator with the QuantizeLinear right behind it; an activation between the two stops some of them.
1. Every user of the clamp is such a QuantizeLinear: the clamp goes.
2. Some are not: those alone are fed from the clamp, the others from before it.
Left alone: clamps with computed bounds, per-channel scales, zero points that are no constants; a range wider than
the clamp's.
"""

from __future__ import annotations

import onnx_ir as ir

_RANGES = {ir.DataType.UINT8: (0, 255), ir.DataType.INT8: (-128, 127)}


class SaturatedClampPass(ir.passes.InPlacePass):
    """Bypass every clamp that the QuantizeLinear behind it repeats."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite; dead clamps are left to dead-code removal."""
        modified = False
        for node in model.graph.all_nodes():
            if node.op_type != "QuantizeLinear" or node.inputs[0] is None:
                continue
            clamp = node.inputs[0].producer()
            limits = _limits(clamp)
            if clamp is None or limits is None or not saturates_within(node, *limits):
                continue
            node.replace_input_with(0, clamp.inputs[0])
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _limits(clamp: ir.Node | None) -> tuple[float, float] | None:
    """Return the bounds of a clamp, None if the node is none."""
    if clamp is None or clamp.domain != "":
        return None
    if clamp.op_type == "Relu":
        return 0.0, float("inf")
    if clamp.op_type != "Clip":
        return None
    low, high = ([*clamp.inputs, None, None])[1:3]
    bounds = []
    for bound, default in ((low, float("-inf")), (high, float("inf"))):
        tensor = None if bound is None else ir.convenience.get_const_tensor(bound)
        if bound is not None and tensor is None:
            return None
        bounds.append(default if tensor is None else float(tensor.numpy().reshape(-1)[0]))
    return bounds[0], bounds[1]


def saturates_within(quantize: ir.Node, low: float, high: float) -> bool:
    """Whether every number outside [low, high] quantizes as the nearer bound does."""
    constants = [None if value is None else ir.convenience.get_const_tensor(value) for value in quantize.inputs[1:]]
    if len(constants) < 2 or constants[0] is None or constants[1] is None or constants[0].size != 1:
        return False
    zero_dtype = constants[1].dtype
    if zero_dtype not in _RANGES:
        return False
    scale, zero = (float(tensor.numpy().reshape(-1)[0]) for tensor in constants if tensor is not None)
    smallest, largest = _RANGES[zero_dtype]
    return low <= (smallest - zero) * scale and (largest - zero) * scale <= high
