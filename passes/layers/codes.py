"""Look-ups by stored bytes: what `codebook` makes of a weight, and no embedding table of the model's.

embedding(table, to(bytes, int64))                      bytes: uint8, stored, or rows of that
embedding(table, to(embedding(digits, ..), int64))      digits: likewise
"""

from __future__ import annotations

import torch
from torch import fx

from graphopt.ir.graph import constant
from graphopt.ir.operators import CASTS, RESHAPES

aten = torch.ops.aten
_SAME_NUMBERS = CASTS | RESHAPES


def is_lookup(node: fx.Node, gm: fx.GraphModule) -> bool:
    """Tell whether a call reads those entries of a table that stored bytes say."""
    return node.target is aten.embedding.default and _of_bytes(node.args[1], gm)


def _of_bytes(value: object, gm: fx.GraphModule) -> bool:
    """Whether numbers are stored bytes, or what a table of bytes holds in their place."""
    while isinstance(value, fx.Node):
        tensor = constant(value.args[0] if value.target is aten.embedding.default else value, gm)
        if tensor is not None:
            return tensor.dtype is torch.uint8
        if value not in _SAME_NUMBERS and value.target not in (aten.slice.Tensor, aten.add.Tensor):
            return False
        value = value.args[0]
    return False
