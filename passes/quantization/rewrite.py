"""Carries out an int8 plan.

Each function is one line of this algebra:

conv(x, w, b)       -> conv(x, dequantize(w_int), b')
linear(x, w, b)     -> linear(x, dequantize(w_int), dequantize(b_int)),  or  x @ dequantize(w_int.T) + b
relu(conv(..))      -> conv(..)                                          where quantize clamps the same
v                   -> dequantize(quantize(v))                           for the readers the plan names
move(dequantize(q)) -> dequantize(move(q))
hardsigmoid(dequantize(q, s, z)) -> dequantize(quantize(relu(dequantize(q, s, z - 3 / s)), 6 / 255, 0), 1 / 255, 0)
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.editor import Editor
from graphopt.ir.graph import behind_inputs, constant
from graphopt.ir.operators import short_name
from graphopt.passes.layers.weighted_call import WeightedCall, layer_call, set_argument
from graphopt.passes.quantization.given_scales import WIDTH, steps_of_shift
from graphopt.passes.quantization.plan import Int8Plan, LayerRecord, ValueRecord, stored_name
from graphopt.quantization.formats import storage_dtype
from graphopt.quantization.ops import DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from graphopt.quantization.stored_range import record_range

aten = torch.ops.aten


class Rewriter:
    """Rewrites the prepared graph of one program."""

    def __init__(self, editor: Editor, plan: Int8Plan) -> None:
        self._editor = editor
        self._graph = editor.graph
        self._tensors: Mapping[str, Tensor] = plan.tensors
        self._plan = plan
        self._tables = {record["weight"] for record in plan.tables}
        self._nodes = {node.name: node for node in editor.graph.nodes}
        self._reads: dict[str, fx.Node] = {}
        self._takers: dict[str, fx.Node] = {}  # calls that took over the operands of a respelled layer
        self._dropped: dict[fx.Node, fx.Node] = {}  # activations, by what stands for them
        self._dynamic: dict[fx.Node, fx.Node] = {}
        self._first_input = next(node for node in editor.graph.nodes if node.op == "placeholder")

    def run(self) -> None:
        """Rewrite layers, then activations, then values, in graph order."""
        for layer in self._plan.layers:
            self._rewrite_layer(layer)
        for name in self._plan.dropped:
            activation = self._nodes[name]
            source = activation.args[0]
            assert isinstance(source, fx.Node)  # an activation has one operand
            self._nodes[name] = source
            self._dropped[source] = activation
            self._editor.replace(activation, source)
        moved = {record["value"] for record in self._plan.values if record["form"] == "move"}
        moving = {self._nodes[name] for name in moved}
        for record in self._plan.values:
            self._rewrite_value(record, moving)

    def _rewrite_layer(self, layer: LayerRecord) -> None:
        node = self._nodes[layer["site"]]
        with self._graph.inserting_before(node):
            turned = layer["transposed"] and layer["weight"] in self._tables
            weight = self._stored(layer["weight"], layer["axis"], node, turned=turned)
            bias = self._bias(layer, node)
        call = layer_call(node, self._editor.gm)
        assert call is not None  # the plan found it there
        if layer["kernel"] == "matmul":
            x = self._read_dynamically(call) if layer["scales"] == "dynamic" else call.input
            self._nodes[node.name] = self._product(node, x, weight, bias)
        elif layer["kernel"] == "gemm" and len(node.meta["val"].shape) > 2:
            self._nodes[node.name] = self._flattened(call, weight, bias)
        else:
            set_argument(node, call.weight_argument, weight)
            if bias is not None:
                set_argument(node, call.bias_argument, bias)

    def _bias(self, layer: LayerRecord, node: fx.Node) -> fx.Node | None:
        name = layer["bias"]
        if name is None:
            return None
        if layer["bias_dtype"] == "int32":
            return self._stored(name, 0, node)
        read = [constant(source, self._editor.gm) for source in node.all_input_nodes]
        learned = [tensor for tensor in read if isinstance(tensor, torch.nn.Parameter)]
        kind = next((tensor for tensor in learned if tensor.dim() == 1), learned[0] if learned else None)
        return self._read(name, node, trainable=True, kind_of=kind)

    def _read_dynamically(self, call: WeightedCall) -> fx.Node:
        """Return the input of a layer as its own range quantizes it, once for all layers that read it so."""
        x = call.input
        if x not in self._dynamic:
            with self._graph.inserting_before(call.node):  # the first that reads it so
                parts = self._call(DYNAMIC_QUANTIZE, x, like=call.node)
                items = [self._call(operator.getitem, parts, item, like=call.node) for item in range(3)]
                self._dynamic[x] = self._call(DEQUANTIZE, *items, None, like=call.node)
        return self._dynamic[x]

    def _product(self, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
        """Rewrite linear, addmm, mm or matmul as `x @ w` plus a bias."""
        with self._graph.inserting_before(node):
            product = self._editor.call(aten.matmul.default, x, weight, like=node, site=node.name)
            self._takers[node.name] = product
            if bias is not None:
                product = self._editor.call(aten.add.Tensor, product, bias, like=node, site=node.name)
        self._editor.replace(node, product)
        return product

    def _flattened(self, call: WeightedCall, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
        """Rewrite a product with a bias as a matrix product; leading axes, of fixed size, are flattened for it."""
        node, x = call.node, call.input
        sizes = list(node.meta["val"].shape)
        with self._graph.inserting_before(node):
            flat = self._editor.call(aten.reshape.default, x, [-1, x.meta["val"].shape[-1]], like=node, site=node.name)
            self._takers[node.name] = flat
            product = self._editor.call(aten.linear.default, flat, weight, bias, like=node, site=node.name)
            result = self._editor.call(aten.reshape.default, product, sizes, like=node, site=node.name)
        self._editor.replace(node, result)
        return result

    def _rewrite_value(self, record: ValueRecord, moving: set[fx.Node]) -> None:
        node = self._nodes[record["value"]]
        clamp_scale = None
        if record["form"] == "hard_sigmoid":
            node, clamp_scale = self._shifted(node, record)
        users = list(node.users)
        if record["readers"] is not None:
            readers = {self._takers.get(name, self._nodes[name]) for name in record["readers"]}
            users = [user for user in users if user in readers]
        with self._graph.inserting_after(behind_inputs(node)):
            stored = self._integers(node, record, clamp_scale)
        if not isinstance(stored.meta["val"], Tensor):
            return  # a list of moved values; its items have records of their own
        movers = [user for user in users if user in moving]
        others = [user for user in users if user not in moving]
        for user in movers:
            user.replace_input_with(node, stored)
        if not others:
            return
        scale, zero_point = self._qparams(record, node)
        with self._graph.inserting_after(behind_inputs(stored)):
            like = self._dropped.get(node, node)
            real = self._editor.call(DEQUANTIZE, stored, scale, zero_point, None, like=like, site=record["value"])
        for user in others:
            user.replace_input_with(node, real)

    def _shifted(self, node: fx.Node, record: ValueRecord) -> tuple[fx.Node, fx.Node]:
        """Rewrite `hardsigmoid` as a clamp of other numbers; return the clamp and the scale to store it with."""
        real = node.args[0]
        assert isinstance(real, fx.Node)  # the dequantization of its operand, whose record came before
        stored, scale, zero_point = real.args[:3]
        values = [constant(read, self._editor.gm) for read in (scale, zero_point)]
        assert values[0] is not None
        assert values[1] is not None
        shift = steps_of_shift(float(values[0]))
        lower = self._put(stored_name(record["value"], "zero_point_of_operand"), values[1] - shift, node)
        with self._graph.inserting_before(node):
            moved = self._editor.call(DEQUANTIZE, stored, scale, lower, None, like=node, site=record["value"])
            clamp = self._editor.call(aten.relu.default, moved, like=node, site=record["value"])
        self._editor.replace(node, clamp)
        self._nodes[record["value"]] = clamp
        width = torch.tensor(WIDTH / (record["high"] - record["low"]), dtype=torch.float32)
        return clamp, self._put(stored_name(record["value"], "scale_of_clamp"), width, clamp)

    def _integers(self, node: fx.Node, record: ValueRecord, scale: fx.Node | None) -> fx.Node:
        """Return the node that holds the integers of a value; they may be stored with another scale than read."""
        if record["form"] == "move":
            if short_name(node) == "pad":  # what is padded is 0, which is stored as the zero point
                node.args = (node.args[0], node.args[1], "constant", float(record["zero_point"]))
                node.kwargs = {}
            self._editor.propagate(node)
            return node
        if record["form"] == "constant":
            return self._read(stored_name(record["value"], "integers"), node)
        scale_of_reads, zero_point = self._qparams(record, node)
        bounds, like = (record["low"], record["high"]), self._dropped.get(node, node)
        return self._editor.call(
            QUANTIZE, node, scale or scale_of_reads, zero_point, None, *bounds, like=like, site=record["value"]
        )

    def _call(self, target: Any, *args: Any, like: fx.Node) -> fx.Node:
        return self._editor.call(target, *args, like=like, site=like.name)

    def _qparams(self, record: ValueRecord, like: fx.Node) -> tuple[fx.Node, fx.Node]:
        dtype = storage_dtype(record["low"], record["high"])
        scale = torch.tensor(record["scale"], dtype=torch.float32)
        zero_point = torch.tensor(record["zero_point"], dtype=dtype)
        return (
            self._put(stored_name(record["source"], "scale"), scale, like),
            self._put(stored_name(record["source"], "zero_point"), zero_point, like),
        )

    def _stored(self, name: str, axis: int | None, like: fx.Node, *, turned: bool = False) -> fx.Node:
        """Insert the dequantization of a stored tensor of the plan, of its transpose where it is `turned`."""
        integers = self._read(name, like)
        if turned:
            integers = self._editor.call(aten.t.default, integers, like=like, site=like.name)
        scale = self._read(f"{name}_scale", like)
        zero = torch.zeros(self._tensors[f"{name}_scale"].shape, dtype=self._tensors[name].dtype)
        zero_point = self._put(f"{name}_zero_point", zero, like)
        read = self._editor.call(DEQUANTIZE, integers, scale, zero_point, axis, like=like, site=like.name)
        if self._tensors[name].dtype is not torch.int32 and name not in self._tables:
            record_range(read, *self._plan.weight_range)
        return read

    def _read(self, name: str, like: fx.Node, *, trainable: bool = False, kind_of: Tensor | None = None) -> fx.Node:
        return self._put(name, self._tensors[name], like, trainable=trainable, kind_of=kind_of)

    def _put(
        self, name: str, tensor: Tensor, like: fx.Node, *, trainable: bool = False, kind_of: Tensor | None = None
    ) -> fx.Node:
        """Store a tensor once and return the one read of it, at the top of the graph."""
        if name not in self._reads:
            self._editor.put(name, tensor, trainable=trainable, kind_of=kind_of)
            with self._graph.inserting_before(self._first_input):
                self._reads[name] = self._editor.read(name, like=like, site=like.name)
        return self._reads[name]
