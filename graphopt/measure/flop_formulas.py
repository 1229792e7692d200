"""Products that torch's counter of operations does not know (torch 2.13), as it takes them: functions of shapes.

A distance between rows is a sum of products too: a difference is squared and added, or multiplied and added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

Shape = Sequence[int]

aten = torch.ops.aten


def _matrix_vector(matrix: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(matrix)


def _added_matrix_vector(_: Shape, matrix: Shape, *__: Any, **___: Any) -> int:
    return 2 * math.prod(matrix)


def _added_matrices(_: Shape, left: Shape, right: Shape, *__: Any, **___: Any) -> int:
    return 2 * math.prod(left) * right[-1]


def _matrices(left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(left) * right[-1]


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


FORMULAS: dict[Any, Callable[..., int]] = {
    aten.mv: _matrix_vector,
    aten.addmv: _added_matrix_vector,
    aten.dot: _matrix_vector,
    aten.vdot: _matrix_vector,
    aten.addbmm: _added_matrices,
    aten._addmm_activation: _added_matrices,
    aten._int_mm: _matrices,
    aten._trilinear: _trilinear,
    aten._cdist_forward: _distances,
    aten._euclidean_dist: _distances,
}
