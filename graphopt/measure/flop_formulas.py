"""Products that torch's counter of operations does not know (torch 2.13), as it takes them: functions of shapes.

A distance between rows is a sum of products too: a difference is squared and added, or multiplied and added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from graphopt.quantization.recurrent import DYNAMIC_LSTM

Shape = Sequence[int]

aten = torch.ops.aten


def _with_vector(matrix: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(matrix)


def _with_matrix(left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(left) * right[-1]


def _added(product: Callable[..., int]) -> Callable[..., int]:
    """Return the formula of a product that is added to the operator's first tensor."""
    return lambda _, *factors, **options: product(*factors, **options)


def _distances(left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(np.broadcast_shapes(left[:-2], right[:-2])) * left[-2] * right[-2] * left[-1]


def _trilinear(*args: Any, **_: Any) -> int:
    """Three tensors, and where each has the axes of size 1 that the others have not; they are multiplied and summed."""
    shapes = []
    for shape, missing in zip(args[:3], args[3:6], strict=True):
        sizes = iter(shape)
        rank = len(shape) + len(missing)
        shapes.append([1 if axis in missing else next(sizes) for axis in range(rank)])
    return 2 * math.prod(np.broadcast_shapes(*shapes))


def _dynamic_lstm(
    x: Shape, h: Shape, c: Shape, weight: Shape, weight_scale: Shape, recurrent: Shape, *_: Any, **__: Any
) -> int:
    return 2 * math.prod(x[:2]) * (math.prod(weight) + math.prod(recurrent))


FORMULAS: dict[Any, Callable[..., int]] = {
    aten.mv: _with_vector,
    aten.addmv: _added(_with_vector),
    aten.dot: _with_vector,
    aten.vdot: _with_vector,
    aten.addbmm: _added(_with_matrix),
    aten._addmm_activation: _added(_with_matrix),
    aten._int_mm: _with_matrix,
    aten._trilinear: _trilinear,
    aten._cdist_forward: _distances,
    aten._euclidean_dist: _distances,
    DYNAMIC_LSTM.overloadpacket: _dynamic_lstm,
}
