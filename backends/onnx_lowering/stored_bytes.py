"""Keep bytes that are stored for their size: the exporter computes ahead of time what depends on small constants alone.

Given:   w = Gather(table, Cast(bytes))               bytes: uint8, stored
Export:  w = Gather(table, Cast(Stored(bytes)))       an operator of graphopt's own, which nobody can compute
Result:  as it was

Left alone: bytes that operators of graphopt's own read, which nobody can compute either.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript import evaluator
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from graphopt.backends.onnx_lowering.packed_operators import DOMAIN
from graphopt.ir.torch_internals import OpOverload

_STORED = OpSchema(
    "Stored",
    DOMAIN,
    1,
    inputs=[OpSchema.FormalParameter("bytes", "tensor(uint8)")],
    outputs=[OpSchema.FormalParameter("result", "tensor(uint8)")],
)


@torch.library.custom_op("graphopt::stored", mutates_args=())
def stored(x: Tensor) -> Tensor:
    """Return `x`, stored bytes; stands in a program only while it is exported."""
    return x.clone()


@stored.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


STORED: OpOverload = torch.ops.graphopt.stored.default


def write_stored(x: Any) -> Any:
    """Write a call of `graphopt::stored`."""
    recorder: Any = evaluator.default()  # the exporter's, while it translates
    return recorder.eval(_STORED, (x,), {})


def keep_bytes(exported: ExportedProgram) -> None:
    """Let what ATen operators compute of stored bytes depend on an operator that only the runtime's file is without."""
    graph = exported.graph
    given = {spec.arg.name for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT}
    inputs = graph.find_nodes(op="placeholder")
    for node in (node for node in inputs if node.name not in given and _is_bytes(node)):
        readers = [user for user in node.users if getattr(user.target, "namespace", "") == "aten"]
        if readers:
            with graph.inserting_after(inputs[-1]):
                kept = graph.call_function(STORED, (node,))
            kept.meta["val"] = node.meta["val"]
            for reader in readers:
                reader.replace_input_with(node, kept)


class StoredBytesPass(ir.passes.InPlacePass):
    """Take the operators out again."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Let whoever reads their result read the stored bytes."""
        found = [node for node in model.graph.all_nodes() if (node.domain, node.op_type) == (DOMAIN, "Stored")]
        for node in found:
            assert node.graph is not None  # it is part of the model
            assert node.inputs[0] is not None  # by its schema
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
            node.graph.remove(node, safe=True)
        return ir.passes.PassResult(model, modified=bool(found))


def _is_bytes(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype is torch.uint8
