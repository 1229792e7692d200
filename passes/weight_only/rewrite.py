"""Carries out a plan of `weights`.

linear(x, w, b)        linear(x, dequantize(unpack(bytes), scale, unpack(zero)), b)
addmm(b, x, w), x @ w  the same
embedding(w, ids)      dequantize(unpack(embedding(bytes, ids)), embedding(scale, ids), unpack(embedding(zero, ids)))
x                      x * factor, or the norm that makes it with weight and bias times factor      (AWQ)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx

from graphopt.errors import PassError
from graphopt.ir.editor import Editor
from graphopt.ir.graph import arguments, tensor_attribute
from graphopt.passes.layers.weighted_call import layer_call
from graphopt.passes.weight_only.plan import InputRecord, RowsRecord, WeightsPlan, scaling_name, stored_as
from graphopt.quantization.ops import DEQUANTIZE, UNPACK
from graphopt.quantization.stored_range import record_range

aten = torch.ops.aten


class MatrixRewriter:
    """Rewrites the graph of one program."""

    def __init__(self, editor: Editor, plan: WeightsPlan) -> None:
        self._editor = editor
        self._graph = editor.graph
        self._plan = plan
        self._nodes = {node.name: node for node in editor.graph.nodes}
        self._reads: dict[str, fx.Node] = {}

    def run(self) -> None:
        """Scale values, then let every reader of a weight read its integers."""
        for record in self._plan.inputs:
            self._scale_input(record)
        for name in self._plan.sites:  # in graph order, which a mapping out of a file has not
            rows, whole = self._plan.weights[name], None
            for site in rows["sites"]:
                node = self._node(site)
                if node.target is aten.embedding.default:
                    self._read_rows(node, name, rows)
                    continue
                if whole is None:
                    with self._graph.inserting_before(node):
                        whole = self._dequantized(name, rows, node, lambda read: read)
                self._multiply(node, whole)

    def _node(self, name: str) -> fx.Node:
        if name not in self._nodes:
            raise PassError(f"The plan names `{name}`, which this program has not. Make the plan again.")
        node: fx.Node = self._nodes[name]
        return node

    def _multiply(self, node: fx.Node, weight: fx.Node) -> None:
        call = layer_call(node, self._editor.gm)
        if call is None:
            raise PassError(f"The plan takes `{node.name}` for a product with a stored matrix. Make the plan again.")
        with self._graph.inserting_before(node):
            new = self._editor.call(aten.linear.default, call.input, weight, call.bias, like=node, site=node.name)
        self._editor.replace(node, new)

    def _read_rows(self, node: fx.Node, name: str, rows: RowsRecord) -> None:
        with self._graph.inserting_before(node):

            def chosen(read: fx.Node) -> fx.Node:
                return self._editor.call(aten.embedding.default, read, *node.args[1:], like=node, site=node.name)

            new = self._dequantized(name, rows, node, chosen)
        self._editor.replace(node, new)

    def _dequantized(self, name: str, rows: RowsRecord, like: fx.Node, chosen: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """Insert the dequantization of all rows, or of those that `chosen` takes of a stored tensor."""
        stored = stored_as(name, rows["bits"])
        integers, scale = (chosen(self._read(part, like)) for part in (stored, f"{stored}_scale"))
        zero = self._read(f"{stored}_zero_point", like)
        if not rows["symmetric"]:
            blocks = -(-rows["columns"] // rows["block"])
            zero = self._unpacked(chosen(zero), rows, blocks, like)
        integers = self._unpacked(integers, rows, rows["columns"], like)
        read = self._editor.call(DEQUANTIZE, integers, scale, zero, -1, rows["block"], like=like, site=like.name)
        record_range(read, rows["low"], rows["low"] + (1 << rows["bits"]) - 1)
        return read

    def _unpacked(self, packed: fx.Node, rows: RowsRecord, size: int, like: fx.Node) -> fx.Node:
        if rows["stored_bits"] == 8:
            return packed
        return self._editor.call(UNPACK, packed, size, rows["stored_bits"], rows["low"], like=like, site=like.name)

    def _scale_input(self, record: InputRecord) -> None:
        value = self._node(record["value"])
        factor = self._tensors[scaling_name(record["value"])]
        if record["norm"]:
            given = arguments(self._node(record["norm"]), ())
            for part in (given["weight"], given["bias"]):
                if isinstance(part, fx.Node):
                    old = tensor_attribute(self._editor.gm, str(part.target))
                    self._editor.put(str(part.target), old.detach() * factor, kind_of=old)
            return
        readers = [self._node(name) for name in record["readers"]]
        with self._graph.inserting_before(readers[0]):
            read = self._read(scaling_name(record["value"]), value)
            scaled = self._editor.call(aten.mul.Tensor, value, read, like=value, site=value.name)
        for reader in readers:
            reader.replace_input_with(value, scaled)

    @property
    def _tensors(self) -> Mapping[str, Tensor]:
        return self._plan.tensors

    def _read(self, name: str, like: fx.Node) -> fx.Node:
        """Store a tensor of the plan once, and return the one read of it, at the top of the graph."""
        if name not in self._reads:
            self._editor.put(name, self._tensors[name])
            first = next(iter(self._graph.nodes))
            with self._graph.inserting_before(first):
                self._reads[name] = self._editor.read(name, like=like, site=like.name)
        return self._reads[name]
