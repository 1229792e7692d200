"""What of a quantized program is still float32: layers by their share of the operations, weights by their bytes."""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import fx

from graphopt.ir.operators import ALL_CONVOLUTIONS, ATTENTION, PRODUCTS, RECURRENT, short_name
from graphopt.ir.ownership import memory_key
from graphopt.ir.program import Program
from graphopt.ir.provenance import module_path
from graphopt.measure.cost import node_flops
from graphopt.quantization.ops import DEQUANTIZE
from graphopt.quantization.recurrent import DYNAMIC_LSTM

_WORK = PRODUCTS | ALL_CONVOLUTIONS | ATTENTION | RECURRENT
_LEAST_WORK = 0.02  # of all operations, below which a layer is not worth a word
_LEAST_BYTES = 1 << 16
_NAMED = 4


def left_float(program: Program) -> list[str]:
    """Say what layers compute and weights lie in float32; nothing of a program in which nothing is quantized."""
    if not is_quantized(program):
        return []
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    return [said for said in (_layers(calls), _weights(program)) if said]


def is_quantized(program: Program) -> bool:
    """Whether anything in a program is stored or computed as integers that stand for floats."""
    return any(node.target in (DEQUANTIZE, DYNAMIC_LSTM) for node in program.graph.nodes)


def _layers(calls: list[fx.Node]) -> str:
    total = sum(node_flops(node) for node in calls)
    shares: Counter[str] = Counter()
    for node in calls:
        if node in _WORK and not _multiplies_integers(node):
            shares[module_path(node) or short_name(node)] += node_flops(node)
    found = [(name, flops / total) for name, flops in shares.most_common() if flops > _LEAST_WORK * total]
    if not found:
        return ""
    named = _listed([f"`{name}` {share:.0%}" for name, share in found])
    whole = sum(share for _, share in found)
    return f"{whole:.0%} of the operations are of layers that compute in float32: {named}"


def _multiplies_integers(node: fx.Node) -> bool:
    """Whether a weight is stored as integers, or two values are: a float layer may read one that is for others."""
    read = [used for used in node.all_input_nodes if used.target is DEQUANTIZE]
    return len(read) > 1 or any(_is_stored(value.args[0]) for value in read)


def _is_stored(value: object) -> bool:
    """Whether a value is read from the program, unpacked and turned perhaps."""
    while isinstance(value, fx.Node) and value.op == "call_function" and len(value.all_input_nodes) == 1:
        value = value.all_input_nodes[0]
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _weights(program: Program) -> str:
    gm = program.graph_module
    tensors = {memory_key(tensor): (name, tensor) for name, tensor in (*gm.named_parameters(), *gm.named_buffers())}
    total = sum(tensor.nbytes for _, tensor in tensors.values())
    floats = [item for item in tensors.values() if item[1].dtype is torch.float32]
    large = [item for item in floats if item[1].nbytes >= _LEAST_BYTES]  # others are not worth a name
    if not large:
        return ""
    large.sort(key=lambda item: -item[1].nbytes)
    named = _listed([f"`{name}` {tensor.nbytes / 1e6:.2f} MB" for name, tensor in large])
    share = sum(tensor.nbytes for _, tensor in floats) / total
    percent = math.floor(1000 * share) / 10  # 100 where nothing else is stored, and only there
    return f"{percent:g}% of the bytes of weights are float32: {named}"


def _listed(texts: list[str]) -> str:
    more = len(texts) - _NAMED
    return ", ".join(texts[:_NAMED]) + (f" and {more} more" if more > 0 else "")
