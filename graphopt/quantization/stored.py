"""What of a program is stored as integers of 8 bits or fewer that stand for floats."""

from __future__ import annotations

import torch
from torch import fx

from graphopt.ir.program import Program
from graphopt.ir.provenance import origin
from graphopt.quantization.ops import DEQUANTIZE
from graphopt.quantization.recurrent import DYNAMIC_LSTM

_STORED = (torch.int8, torch.uint8)  # wider integers of graphs are indices


def is_quantized(program: Program) -> bool:
    """Whether anything in a program is stored or computed as integers that stand for floats.

    Bytes that a model reads itself may be anything, those that a call reads which a pass made are not. (A file keeps
    which pass made a call, and not which made a tensor.)
    """
    return any(
        node.target in (DEQUANTIZE, DYNAMIC_LSTM) or (_is_read(node) and any(map(_made_by, node.users)))
        for node in program.graph.nodes
    )


def stored_as_integers(graph: fx.Graph) -> set[fx.Node]:
    """Return the values that are computed of stored tensors alone, integers among them: weights as they are read."""
    found: dict[fx.Node, bool] = {}  # of what is computed so, whether there are
    for node in graph.nodes:
        read = node.all_input_nodes
        if node.op == "get_attr":
            found[node] = _is_read(node)
        elif node.op == "call_function" and read and all(value in found for value in read):
            found[node] = any(found[value] for value in read)
    return {node for node, integers in found.items() if integers}


def _is_read(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return node.op == "get_attr" and isinstance(value, torch.Tensor) and value.dtype in _STORED


def _made_by(node: fx.Node) -> str:
    found = origin(node)
    return found.made_by if found is not None else ""
