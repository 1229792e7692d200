"""Relu between integers as LeakyRelu, which has an integer kernel where Relu is one more rounding in float.

Given:   QuantizeLinear(Relu(DequantizeLinear(q)))
Result:  QuantizeLinear(LeakyRelu(DequantizeLinear(q), alpha=0))

Left alone: a Relu that something else than QuantizeLinear reads, too, or that is returned.
"""

from __future__ import annotations

import onnx_ir as ir


class IntegerReluPass(ir.passes.InPlacePass):
    """Rewrite every graph in the model."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite; `modified` says whether there was one."""
        matches = [node for node in model.graph.all_nodes() if _is_between_integers(node)]
        for node in matches:
            node.op_type = "LeakyRelu"
            node.attributes.add(ir.AttrFloat32("alpha", 0.0))
        return ir.passes.PassResult(model, modified=bool(matches))


def _is_between_integers(node: ir.Node) -> bool:
    if node.op_type != "Relu" or node.domain != "" or node.inputs[0] is None or node.outputs[0].is_graph_output():
        return False
    source, readers = node.inputs[0].producer(), node.outputs[0].consumers()
    quantized = bool(readers) and all(reader.op_type == "QuantizeLinear" for reader in readers)
    return quantized and source is not None and source.op_type == "DequantizeLinear"
