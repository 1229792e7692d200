"""Remove what must not be in a file that is shipped: source paths, and whatever differs between two runs."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.backends.onnx_lowering.exporter import MODULE_PROPERTY, SOURCE_PROPERTY

_KEPT = (MODULE_PROPERTY, SOURCE_PROPERTY)


class StripMetadataPass(ir.passes.InPlacePass):
    """Keep module paths and program names on nodes; drop every other note, and name graphopt as the producer."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Strip the model, its graphs, nodes, values and stored tensors."""
        model.producer_name, model.producer_version = "graphopt", None
        model.doc_string = None
        model.metadata_props.clear()
        for graph in model.graphs():
            graph.doc_string = None
            graph.metadata_props.clear()
            for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
                _strip_value(value)
            for node in graph:
                node.doc_string = None
                for key in [key for key in node.metadata_props if key not in _KEPT]:
                    del node.metadata_props[key]
                for value in node.outputs:
                    _strip_value(value)
        return ir.passes.PassResult(model, modified=True)


def _strip_value(value: ir.Value) -> None:
    value.metadata_props.clear()
    value.doc_string = None
    tensor = value.const_value
    if isinstance(tensor, ir.TensorProtoTensor):  # from a function of the exporter's library; its notes are fixed
        value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
    elif tensor is not None:
        tensor.doc_string = None
        tensor.metadata_props.clear()
