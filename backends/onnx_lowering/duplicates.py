"""Store equal tensors once: scales and shapes repeat, and so do tied weights.

The first of several stays. Left alone: initializers that are graph inputs or outputs. (onnx_ir 1.1 has such a pass,
which fails on weights that are views of another layout.)
"""

from __future__ import annotations

import hashlib

import onnx_ir as ir


class DuplicateInitializersPass(ir.passes.InPlacePass):
    """Let every user of a repeated initializer read the first one like it."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the main graph and each subgraph on its own."""
        modified = False
        for graph in model.graphs():
            first: dict[tuple[object, ...], ir.Value] = {}
            for value in list(graph.initializers.values()):
                if value.const_value is None or value.is_graph_input() or value.is_graph_output():
                    continue
                kept = first.setdefault(_content(value.const_value), value)
                if kept is not value:
                    value.replace_all_uses_with(kept)
                    del graph.initializers[str(value.name)]
                    modified = True
        return ir.passes.PassResult(model, modified=modified)


def _content(tensor: ir.TensorProtocol) -> tuple[object, ...]:
    shape = tuple(int(size) for size in tensor.shape.numpy())
    return tensor.dtype, shape, hashlib.sha256(tensor.tobytes()).digest()
