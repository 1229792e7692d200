"""Let no zero point be a value that is computed with, too, as the 0 that is added in place of a Relu would be.

Given:   d = DequantizeLinear(x, s, zero); Add(d, DequantizeLinear(zero, s, zero))
Result:  d = DequantizeLinear(x, s, zero); Add(d, DequantizeLinear(zero_value, s, zero))

ONNX Runtime reorders what is added with the value it is added to, and then computes a zero point that is the same
tensor in every run (by a Squeeze, 1.31.1), which keeps convolutions from its fastest kernels: depthwise ones take up to
1.9 times as long.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.backends.onnx_lowering.values import store, value_names

_ZERO_POINT = 2  # which input of QuantizeLinear and DequantizeLinear it is


class OwnZeroPointsPass(ir.passes.InPlacePass):
    """Store anew what is read as a value and as a zero point."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every graph."""
        modified = False
        names = value_names(model)
        for graph in model.graphs():
            for value in list(graph.initializers.values()):
                uses = list(value.uses())
                read = [use for use in uses if use.node.op_type == "DequantizeLinear" and use.idx == 0]
                if value.const_value is None or not read or not any(_is_zero_point(*use) for use in uses):
                    continue
                own = store(graph, names.new(f"{value.name}_value"), value.const_value.numpy())
                for use in read:
                    use.node.replace_input_with(0, own)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _is_zero_point(reader: ir.Node, index: int) -> bool:
    return reader.op_type in ("QuantizeLinear", "DequantizeLinear") and index == _ZERO_POINT
