"""Products with a stored matrix that is turned around are Linear layers.

    matmul(x, t(w))    ->    linear(x, w)         w: a stored matrix, which an embedding table may be, too

What is known of layers holds for them then, and a matrix that others read stays one.
"""

from __future__ import annotations

import torch
from torch import fx

from graphopt.ir.graph import arguments
from graphopt.ir.operators import REORDERS

aten = torch.ops.aten
_PRODUCTS = {aten.matmul.default, aten.mm.default}


def restate_products(graph: fx.Graph) -> None:
    """Write such products of floating values as Linear layers; what turned the matrix is left."""
    for node in graph.nodes:
        if node.target not in _PRODUCTS:
            continue
        given, turned = node.args
        matrix = arguments(turned, ()).get("self") if turned in REORDERS else None
        if not isinstance(matrix, fx.Node) or matrix.op != "get_attr":
            continue
        stored, value = matrix.meta["val"], turned.meta["val"]
        transposed = value.shape == stored.shape[::-1] and value.stride() == stored.stride()[::-1]
        if stored.dim() == 2 and stored.is_floating_point() and transposed:
            node.target, node.args = aten.linear.default, (given, matrix)
