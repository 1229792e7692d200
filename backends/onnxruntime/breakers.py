"""Operators that ONNX Runtime fuses to what is wrong or slow, mostly integers, kept apart by a copy behind them.

Given:   QuantizeLinear(Softmax(DequantizeLinear(q)))
Result:  QuantizeLinear(Max(Softmax(DequantizeLinear(q))))

Given:   QuantizeLinear(Conv(DequantizeLinear(q), w))          w: float
Result:  QuantizeLinear(Max(Conv(DequantizeLinear(q), w)))

Given:   QuantizeLinear(Add(MatMul(DequantizeLinear(q), w), b))      w: float; it would become a Gemm, rounded likewise
Result:  QuantizeLinear(Add(Max(MatMul(DequantizeLinear(q), w)), b))

Given:   QuantizeLinear(DequantizeLinear(q, s, z), t, y)       other scales; the optimizer would round once
Result:  QuantizeLinear(Max(DequantizeLinear(q, s, z)), t, y)

Given:   QuantizeLinear(MaxPool(x))                            x: float; the optimizer would quantize it before
Result:  QuantizeLinear(Max(MaxPool(x)))

Given:   MatMul(Transpose(x), w)                               x: float16, its first axis moved; the process would end
Result:  MatMul(Max(Transpose(x)), w)                          in FusedMatMul, while it loads the file

Given:   MaxPool(Pad(x))                                       by zeros; the optimizer would pad the pooling, which no
Result:  MaxPool(Max(Pad(x)))                                  window sees (microsoft/onnxruntime#24737)

The Max of one value is that value, which the optimizer does not know: it fuses nothing across it, whatever options the
file is loaded with. Most were found by `tools/fuzz_runtime.py`; the table has the version each was last seen in.

Integers are pooled fast behind an integer convolution alone, where channels lie last: 64 channels of 112x112 take 45 ms
where floats take 0.1 ms (1.31.1, one thread, AVX2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.backends.onnx_lowering.values import value_names
from graphopt.ir.names import Names


def _always(node: ir.Node) -> bool:
    return True


def _weight_is_float(node: ir.Node) -> bool:
    weight = node.inputs[1].producer() if node.inputs[1] is not None else None
    return weight is None or weight.op_type != "DequantizeLinear"


def _counts_what_is_beyond(node: ir.Node) -> bool:
    """Whether windows may end behind the padding, where padding counts."""
    given = node.attributes
    return bool(given.get_int("ceil_mode", 0) and given.get_int("count_include_pad", 0))


@dataclass(frozen=True, slots=True)
class Breaker:
    """An operator between DequantizeLinear and QuantizeLinear that becomes a kernel which computes something else.

    Attributes:
        what: what is wrong with the kernel.
        version: of onnxruntime, the last it was seen in.
        wrong: which of its nodes it is wrong for.
    """

    what: str
    version: str
    wrong: Callable[[ir.Node], bool] = _always


_ROUNDED = Breaker(
    "WeightBiasQuantization rounds a float weight, with one scale for all of it", "1.31.1", _weight_is_float
)
BREAKERS: Mapping[str, Breaker] = {
    "Softmax": Breaker("QLinearSoftmax is off by tens of steps where logits lie close together", "1.31.1"),
    "AveragePool": Breaker("QLinearAveragePool counts what is behind the padding", "1.31.1", _counts_what_is_beyond),
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm"), _ROUNDED),
}

# The optimizer moves quantizations across these, up and down, or drops them.
_MOVES = frozenset(
    ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Gather", "MaxPool", "Identity", "Split")
) | {"Relu", "Clip"}


def keep_apart(model: ir.Model) -> None:
    """Put a copy behind every operator with a breaker that stands between integers, and between two quantizations."""
    names = value_names(model)
    for graph in model.graphs():
        for node in [node for node in graph if node.domain == ""]:
            if node.op_type == "AveragePool" and not any(node.attributes.get_ints("pads", ())):
                node.attributes.add(ir.AttrInt64("count_include_pad", 0))  # there is no padding to count
            readers = list(node.outputs[0].consumers())
            if node.op_type == "DequantizeLinear":
                _copy(graph, node, [reader for reader in readers if reader.op_type == "QuantizeLinear"], names)
            elif node.op_type == "MaxPool" and not _reads_integers(node):
                _copy(graph, node, [reader for reader in readers if _meets(reader, "QuantizeLinear", _readers)], names)
            elif node.op_type == "MatMul" and _weight_is_float(node) and _reads_integers(node):  # 1.31.1
                _copy(graph, node, [reader for reader in readers if _is_quantized_sum(reader)], names)
            elif node.op_type == "Transpose" and node.outputs[0].dtype == ir.DataType.FLOAT16:  # 1.31.1
                moved = node.attributes.get_ints("perm", (1,))[0] != 0
                _copy(graph, node, [reader for reader in readers if moved and reader.op_type == "MatMul"], names)
            elif node.op_type == "Pad":  # 1.31.1
                _copy(graph, node, [reader for reader in readers if _takes_a_pad_wrongly(node, reader)], names)
            elif node.op_type in BREAKERS and _between_integers(node) and BREAKERS[node.op_type].wrong(node):
                _copy(graph, node, readers, names)


def _takes_a_pad_wrongly(pad: ir.Node, pool: ir.Node) -> bool:
    """Whether a pooling behind is wrong with a pad taken in: zeros may be the largest, or more than its kernel is."""
    if pool.op_type not in ("MaxPool", "AveragePool"):
        return False
    kernel = pool.attributes.get_ints("kernel_shape", ())
    around = pad.inputs[1].const_value if len(pad.inputs) > 1 and pad.inputs[1] is not None else None
    own = pool.attributes.get_ints("pads", (0,) * 2 * len(kernel))
    if around is None:
        return True
    sides = around.numpy().reshape(2, -1)[:, -len(kernel) :]
    wide = (sides + np.reshape(own, (2, -1)) >= np.array(kernel)).any()
    return bool(wide) or (pool.op_type == "MaxPool" and _zeros_may_be_largest(pad))


def _zeros_may_be_largest(pad: ir.Node) -> bool:
    """Whether what is put around is zero, which alone the optimizer takes, and may be above what it is around."""
    filling = pad.inputs[2] if len(pad.inputs) > 2 else None
    constant = None if filling is None else filling.const_value
    source = pad.inputs[0].producer() if pad.inputs[0] is not None else None
    return (constant is None or not constant.numpy().any()) and (source is None or source.op_type != "Relu")


def _between_integers(node: ir.Node) -> bool:
    """Whether it reads integers, and is read as such, across moves perhaps."""
    return _reads_integers(node) and _is_quantized(node)


def _reads_integers(node: ir.Node) -> bool:
    given = (value.producer() for value in node.inputs if value is not None)
    return any(_meets(node, "DequantizeLinear", _producers) for node in given if node is not None)


def _is_quantized(node: ir.Node) -> bool:
    return any(_meets(user, "QuantizeLinear", _readers) for user in node.outputs[0].consumers())


def _is_quantized_sum(node: ir.Node) -> bool:
    return node.op_type == "Add" and _is_quantized(node)


def _meets(node: ir.Node, wanted: str, further: Callable[[ir.Node], Iterator[ir.Node]]) -> bool:
    if node.op_type == wanted:
        return True
    return node.op_type in _MOVES and any(_meets(other, wanted, further) for other in further(node))


def _producers(node: ir.Node) -> Iterator[ir.Node]:
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    if source is not None:
        yield source


def _readers(node: ir.Node) -> Iterator[ir.Node]:
    for output in node.outputs:
        yield from output.consumers()


def _copy(graph: ir.Graph, node: ir.Node, readers: Sequence[ir.Node], names: Names) -> None:
    """Let some readers of a result read a copy of it."""
    if not readers:
        return
    result = node.outputs[0]
    copy = ir.node("Max", [result], metadata_props=dict(node.metadata_props))
    value = copy.outputs[0]
    value.name, value.shape, value.type = names.new(f"{result.name}_copy"), result.shape, result.type
    graph.insert_after(node, copy)
    for reader in readers:
        for place, given in enumerate(reader.inputs):
            if given is result:
                reader.replace_input_with(place, value)
