"""A quantized program's differentiable twin: the same graph on real numbers that lie where its integers stand.

dequantize(w_int, s)                     fake_quantize(w, s)            w = w_int * s at first, trained
dequantize(quantize(x, s), s)            fake_quantize(x, s)
dequantize(move(quantize(x, s)), s)      move(fake_quantize(x, s))      what only moves integers moves reals
dequantize(quantize(x, s, z), t, y)      (fake_quantize(x, s, z) / s + z - y) * t
dequantize(dynamic_quantize(x))          fake_quantize(x, s, z)         by the range of x, without a gradient to it
dequantize(b_int, s_x * s_w)             fake_quantize(b, s_x * s_w)
table[codes]                             table[nearest(w)]              straight through to w, see `codes`
s                                        s * (7 / 8 + share)            a share of each step, 1 / 8 at first, learned

Untrained it computes what the program does, to the bit. What is trained goes back into the program's tensors: its graph
stays what quantization made it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.editor import Editor
from graphopt.ir.graph import tensor_attribute
from graphopt.ir.operators import ALL_CONVOLUTIONS, PRODUCTS, RESHAPES, short_name
from graphopt.ir.program import Program
from graphopt.passes.layers.weighted_call import layer_call
from graphopt.passes.twins.codes import NEAREST, StoredLookup, find_lookups
from graphopt.passes.twins.sources import LayerWeights
from graphopt.passes.twins.stored import IntegerRead, StoredIntegers, find_reads, stored_way
from graphopt.quantization.ops import DEQUANTIZE, DYNAMIC_QUANTIZE, FAKE_QUANTIZE, QUANTIZE, step_gain

aten = torch.ops.aten

# AdamW takes no notice of a gain, so steps learn an eighth as fast as weights. On ResNet-20 with weights of 4 bits the
# loss after 3 epochs of 5,120 images was 0.132 with steps as fast, 0.113 a tenth as fast, 0.115 with none learned.
_SHARE = 1 / 8
_SMALLEST = 1 / 16  # whatever is learned, a step stays positive


@dataclass(frozen=True, eq=False)
class Twin:
    """What trains in the place of a quantized program.

    Attributes:
        source: that program.
        program: the twin; tensors that are floating in both are called the same.
        integers: trained weights and biases, by the names of what they are trained as.
        shares: names of what is learned of scales, by those of the scales.
        lookups: weights that are looked up, by the names of what they are trained as.
        products: by the name of a bias's scale those of its input and of its weight.
    """

    source: Program
    program: Program
    integers: Mapping[str, StoredIntegers]
    shares: Mapping[str, str]
    lookups: Mapping[str, StoredLookup]
    products: Mapping[str, tuple[str, str]]

    def stored(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of the source that training changes, on the CPU.

        Args:
            trained: tensors of the twin, by name.
        """
        before, start = _on_cpu(self.source.state_dict()), _on_cpu(self.program.state_dict())
        known = {**before, **start, **_on_cpu(trained)}
        found = {name: known[name] for name in trained if name in before}
        for scale, share in self.shares.items():
            found[scale] = known[scale] * (known[share] + (1 - _SHARE)).clamp_min(_SMALLEST)
        for scale, (x, w) in self.products.items():
            steps = (found.get(w, known[w]) * found.get(x, known[x])).reshape(-1)
            found[scale] = steps.repeat(known[scale].numel() // steps.numel())
        for name, integers in self.integers.items():
            steps = found.get(integers.scale, before[integers.scale])
            if not (torch.equal(known[name], start[name]) and torch.equal(steps, before[integers.scale])):
                found[integers.name] = integers.of(known[name], steps)  # biases above 2^24 are no float32
        for name, lookup in self.lookups.items():
            found |= lookup.of(known[name], known[f"{lookup.stem}.table"])
        return {name: tensor for name, tensor in found.items() if not torch.equal(tensor, before[name])}


def twin_of(program: Program, floating: Program | None, original: Program, *, learn_steps: bool) -> Twin:
    """Return the twin of a quantized program.

    Args:
        program: it is not changed.
        floating: what it was before it was quantized: weights start from there, as near as rounds to their integers.
        original: by which weights are trained or frozen.
        learn_steps: whether the steps of integers are learned.
    """
    return _Builder(program, LayerWeights(floating), LayerWeights(original), learn_steps).build()


class _Builder:
    def __init__(self, program: Program, floating: LayerWeights, original: LayerWeights, learn_steps: bool) -> None:
        self._source, self._copy = program, program.copy()
        self._gm = self._copy.graph_module
        self._editor = Editor(self._gm, "qat")
        self._nodes = list(self._gm.graph.nodes)
        self._floating, self._original, self._learn_steps = floating, original, learn_steps
        self._lookups = {lookup.node: lookup for lookup in find_lookups(self._gm)}
        self._weights = {read.node: read for read in find_reads(self._gm) if _readers(read)}
        self._products = dict(filter(None, map(self._product, self._weights.values())))
        self._roots = _quantizations(self._nodes)
        self._trained = {read.integers.name for read in self._weights.values() if self._is_trained(read)}
        frozen = {read.integers.scale for read in self._weights.values() if read.integers.name not in self._trained}
        self._fixed = _read_otherwise(self._roots) | frozen
        self._reals: dict[fx.Node, fx.Node] = {}  # by the integers that they stand for
        self._scales: dict[str, fx.Node] = {}
        self._whole: dict[str, fx.Node] = {}  # weights, by the names of their integers
        self._integers: dict[str, StoredIntegers] = {}
        self._looked_up: dict[str, StoredLookup] = {}
        self._shares: dict[str, str] = {}

    def build(self) -> Twin:
        for node in self._nodes:
            with self._gm.graph.inserting_before(node):
                if node in self._weights:
                    self._replace(node, self._weight(self._weights[node]))
                elif node in self._lookups and self._original.trained(node):
                    self._replace(node, self._nearest(self._lookups[node]))
                elif node.target is QUANTIZE:
                    self._reals[node] = self._quantized(node)
                elif node.target is DYNAMIC_QUANTIZE:
                    node.update_arg(0, self._call(aten.detach.default, node.args[0], like=node))
                elif node.target is DEQUANTIZE:
                    self._dequantize(node)
                elif any(source in self._reals for source in node.all_input_nodes):
                    self._reals[node] = self._moved(node)
        self._let_all_read_learned_scales()
        program = self._copy.with_graph(self._editor.finish())
        products = {name: pair for name, pair in self._products.items() if any(part in self._shares for part in pair)}
        return Twin(self._source, program, self._integers, self._shares, self._looked_up, products)

    def _weight(self, read: IntegerRead) -> fx.Node:
        name = read.integers.name
        if name not in self._whole:
            trained = name in self._trained
            if not trained and read.integers.scale not in self._products:
                return read.node
            self._whole[name] = self._rounded(read, trained=trained)
        real = self._whole[name]
        if read.rows is not None:
            return self._call(aten.embedding.default, real, *read.rows.args[1:], like=read.node)
        return self._call(aten.t.default, real, like=read.node) if read.turned else real

    def _rounded(self, read: IntegerRead, *, trained: bool) -> fx.Node:
        """Insert a weight as what trains, rounded."""
        integers, like = read.integers, read.node
        reals = integers.near(self._floating.of(_readers(read)[0]), self._gm)
        scale = tensor_attribute(self._gm, integers.scale)
        name = self._editor.put(self._editor.new_name(f"{integers.name}_real"), reals, trainable=trained)
        self._integers[name] = integers
        zero = self._editor.put(self._editor.new_name(f"{integers.name}_zero"), integers.zero)
        value, zero_point = self._editor.read(name, like=like), self._editor.read(zero, like=like)
        steps = self._steps_of_bias(integers, like) or self._scale(integers.scale, like)
        gain = step_gain(reals.numel() // max(scale.numel(), 1), integers.high)
        bounds = integers.low, integers.high
        return self._call(
            FAKE_QUANTIZE, value, steps, zero_point, integers.axis, *bounds, integers.block, gain, like=like
        )

    def _nearest(self, lookup: StoredLookup) -> fx.Node:
        """Insert the entries nearest to what trains in the place of codes."""
        node, gm = lookup.node, self._gm
        table, codes = node.args
        entries = lookup.looked_up(gm)
        start = lookup.near(self._floating.rows(node), entries, gm)
        name = self._editor.put(self._editor.new_name(f"{lookup.stem}_real"), start, trainable=True)
        self._looked_up[name] = lookup
        first = self._editor.put(self._editor.new_name(f"{lookup.stem}_first"), lookup.first)
        real, begin = self._editor.read(name, like=node), self._editor.read(first, like=node)
        fixed = self._call(aten.detach.default, real, like=node)
        known = self._call(aten.detach.default, table, like=node)
        codes = self._call(NEAREST, fixed, known, begin, lookup.entries, like=node)
        entry = self._call(aten.embedding.default, table, codes, like=node)
        entry = self._call(aten.detach.default, entry, like=node) if lookup.signs(gm) else entry
        return self._call(aten.add.Tensor, entry, self._call(aten.sub.Tensor, real, fixed, like=node), like=node)

    def _steps_of_bias(self, integers: StoredIntegers, like: fx.Node) -> fx.Node | None:
        if integers.scale not in self._products:
            return None
        x, w = (self._scale(name, like) for name in self._products[integers.scale])
        product = self._call(aten.mul.Tensor, w, x, like=like)
        flat = self._call(aten.reshape.default, product, [-1], like=like)
        times = tensor_attribute(self._gm, integers.scale).numel() // flat.meta["val"].numel()
        return self._call(aten.detach.default, self._call(aten.repeat.default, flat, [times], like=like), like=like)

    def _quantized(self, node: fx.Node) -> fx.Node:
        x, scale, zero_point, axis, low, high = node.args
        sizes = [size for size in node.meta["val"].shape[1:] if isinstance(size, int)]
        steps = self._scale(str(scale.target), node)  # type: ignore[union-attr]
        gain = step_gain(math.prod(sizes), high)  # type: ignore[arg-type]
        return self._call(FAKE_QUANTIZE, x, steps, zero_point, axis, low, high, None, gain, like=node)

    def _dequantize(self, node: fx.Node) -> None:
        integers, scale, zero_point = node.args[:3]
        assert isinstance(integers, fx.Node)
        if integers.target is operator.getitem and integers.args[0].target is DYNAMIC_QUANTIZE:  # type: ignore[union-attr]
            x = integers.args[0].args[0].args[0]  # type: ignore[union-attr] # behind `detach`
            self._replace(node, self._call(FAKE_QUANTIZE, x, scale, zero_point, None, 0, 255, like=node))
        elif integers in self._reals:
            real, root = self._reals[integers], self._roots[integers]
            self._replace(node, real if _reads_as(node, root) else self._read_otherwise(node, real, root))

    def _read_otherwise(self, node: fx.Node, real: fx.Node, root: fx.Node) -> fx.Node:
        """Insert what integers stand for where a call reads them with another scale or zero point."""
        steps = self._call(aten.div.Tensor, real, root.args[1], like=node)
        zeros = [self._call(aten.to.dtype, zero, torch.float32, like=node) for zero in (root.args[2], node.args[2])]
        shifted = self._call(aten.add.Tensor, steps, self._call(aten.sub.Tensor, *zeros, like=node), like=node)
        return self._call(aten.mul.Tensor, shifted, node.args[1], like=node)

    def _moved(self, node: fx.Node) -> fx.Node:
        """Insert what does with reals what a call does with integers."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: self._reals.get(source, source))
        if short_name(node) == "pad":
            args = (*args[:3], 0.0)  # which the zero point stands for
        return self._call(node.target, *args, like=node, **kwargs)  # type: ignore[arg-type]

    def _scale(self, name: str, like: fx.Node) -> fx.Node:
        """Return the one read of a scale, with what is learned of it."""
        if name not in self._scales:
            with self._gm.graph.inserting_before(self._nodes[0]):
                scale = self._editor.read(name, like=like)
                if self._learn_steps and name not in self._fixed:
                    start = torch.full_like(tensor_attribute(self._gm, name), _SHARE)
                    share = self._editor.put(self._editor.new_name(f"{name}_share"), start, trainable=True)
                    self._shares[name] = share
                    read = self._editor.read(share, like=like)
                    factor = self._call(aten.add.Tensor, read, 1 - _SHARE, like=like)
                    factor = self._call(aten.clamp_min.default, factor, _SMALLEST, like=like)
                    scale = self._call(aten.mul.Tensor, scale, factor, like=like)
            self._scales[name] = scale
        return self._scales[name]

    def _let_all_read_learned_scales(self) -> None:
        """Let constants that are stored with a learned scale be read with it."""
        for node in self._nodes:
            if node.op == "get_attr" and str(node.target) in self._shares:
                node.replace_all_uses_with(self._scales[str(node.target)])

    def _is_trained(self, read: IntegerRead) -> bool:
        def trained(layer: fx.Node) -> bool:
            call = layer_call(layer, self._gm)
            return self._original.trained(layer, bias=call is not None and call.bias is read.node)

        return any(map(trained, _readers(read)))

    def _product(self, read: IntegerRead) -> tuple[str, tuple[str, str]] | None:
        """Return the scale of an integer bias, and those that it is the product of."""
        for user in read.node.users:
            call = layer_call(user, self._gm)
            if call is None or call.bias is not read.node:
                continue
            x = call.input
            while x in RESHAPES and isinstance(x.args[0], fx.Node):
                x = x.args[0]
            scales = [stored_way(value.args[1])[1] for value in (x, call.weight) if value.target is DEQUANTIZE]
            if len(scales) == 2 and None not in scales:
                return read.integers.scale, (str(scales[0].target), str(scales[1].target))  # type: ignore[union-attr]
        return None

    def _replace(self, node: fx.Node, other: fx.Node) -> None:
        if other is not node:
            node.replace_all_uses_with(other)

    def _call(self, target: Callable[..., Any], *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
        return self._editor.call(target, *args, like=like, **kwargs)


def _readers(read: IntegerRead) -> list[fx.Node]:
    """Return the layers and look-ups that read a weight, or a bias; none of what is no weight."""
    if read.rows is not None:
        return [read.rows]
    return [user for user in read.node.users if user in ALL_CONVOLUTIONS or user in PRODUCTS]


def _quantizations(nodes: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Return for integers that are not stored the call that made them of reals, whatever has moved them since."""
    roots: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node.target is QUANTIZE:
            roots[node] = node
        elif node.target is not DEQUANTIZE:
            moved = next((source for source in node.all_input_nodes if source in roots), None)
            roots.update({} if moved is None else {node: roots[moved]})
    return roots


def _read_otherwise(roots: Mapping[fx.Node, fx.Node]) -> set[str]:
    """Return the scales of integers that stand for other numbers where they are read than where they are made."""
    found = set()
    for integers, root in roots.items():
        for user in integers.users:
            if user.target is DEQUANTIZE and not _reads_as(user, root):
                found |= {str(call.args[1].target) for call in (root, user)}  # type: ignore[union-attr]
    return found


def _reads_as(dequantize: fx.Node, quantize: fx.Node) -> bool:
    return [value.target for value in dequantize.args[1:3]] == [value.target for value in quantize.args[1:3]]  # type: ignore[union-attr]


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}
