"""Let every branch produce what it returns.

if c then {} return x       ->   if c then { y = Identity(x) } return y

ONNX Runtime refuses a subgraph that returns a value of the graph around it.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.backends.onnx_lowering.values import value_names


class BranchOutputsPass(ir.passes.InPlacePass):
    """Insert an Identity where a subgraph returns a value that is not its own."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Repair the outputs of all subgraphs."""
        modified = False
        names = value_names(model)
        for graph in model.graphs():
            if graph is model.graph:
                continue
            for index, value in enumerate(graph.outputs):
                producer = value.producer()
                if producer is not None and producer.graph is graph:
                    continue
                own = ir.Value(name=names.new(f"{value.name}_returned_{index}"), type=value.type, shape=value.shape)
                graph.append(ir.Node("", "Identity", [value], outputs=[own]))
                graph.outputs[index] = own
                modified = True
        return ir.passes.PassResult(model, modified=modified)
