"""What of a quantized program is still float32: layers by operations, weights by bytes, operators by their time."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from torch import fx

from graphopt.ir.operators import ALL_CONVOLUTIONS, ATTENTION, PRODUCTS, RECURRENT, short_name
from graphopt.ir.ownership import memory_key
from graphopt.ir.program import Program
from graphopt.ir.provenance import module_path
from graphopt.measure.cost import node_flops
from graphopt.quantization.ops import DEQUANTIZE
from graphopt.quantization.stored import is_quantized, stored_as_integers
from graphopt.targets.backend import OperatorTime

_WORK = PRODUCTS | ALL_CONVOLUTIONS | ATTENTION | RECURRENT
_LEAST_WORK = 0.02  # of all operations, below which a layer is not worth a word
_LEAST_TIME = 0.02  # likewise of all time
_LEAST_BYTES = 1 << 16
_NAMED = 4


def left_float(program: Program) -> list[str]:
    """Say what layers compute and weights lie in float32; nothing of a program in which nothing is quantized."""
    if not is_quantized(program):
        return []
    return [said for said in (_layers(program.graph), _weights(program)) if said]


def time_in_float(times: Sequence[OperatorTime]) -> list[str]:
    """Say what share of an artifact's time goes to floats, and to turning them into integers and back."""
    total = sum(time.seconds for time in times)
    floats, turned = defaultdict[str, float](float), 0.0
    for time in times:
        if time.values == "float":
            floats[time.operator] += time.seconds / total
        elif time.values == "turned":
            turned += time.seconds / total
    named = [f"{name} {share:.0%}" for name, share in sorted(floats.items(), key=_falling) if share > _LEAST_TIME]
    said = [f"{sum(floats.values()):.0%} of the time is of operators on floats: {_listed(named)}"] if named else []
    if turned > _LEAST_TIME:
        said.append(f"{turned:.0%}{'' if said else ' of the time'} turns values into integers and back")
    return [", and ".join(said)] if said else []


def _falling(share: tuple[str, float]) -> float:
    return -share[1]


def _layers(graph: fx.Graph) -> str:
    calls = [node for node in graph.nodes if node.op == "call_function"]
    stored = stored_as_integers(graph)
    total = sum(node_flops(node) for node in calls)
    shares: Counter[str] = Counter()
    for node in calls:
        if node in _WORK and not _multiplies_integers(node, stored):
            shares[module_path(node) or short_name(node)] += node_flops(node)
    found = [(name, flops / total) for name, flops in shares.most_common() if flops > _LEAST_WORK * total]
    if not found:
        return ""
    named = _listed([f"`{name}` {share:.0%}" for name, share in found])
    whole = sum(share for _, share in found)
    return f"{whole:.0%} of the operations are of layers that compute in float32: {named}"


def _multiplies_integers(node: fx.Node, stored: set[fx.Node]) -> bool:
    """Whether a weight is stored as integers, or two values are: a float layer may read one that is for others."""
    read = node.all_input_nodes
    return sum(used.target is DEQUANTIZE for used in read) > 1 or not stored.isdisjoint(read)


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
