"""AWQ: scales inputs that are large on the data before weights are rounded, so that what meets them is kept better.

    x W^T = (x / s) (W s)^T        s = E[x^2]^(a / 2), a between 0 and 1, the one that changes the products least

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", equation 4; the error
of the products is known exactly from the second moments of x. Layers that read one value share its s, which goes into
the norm that makes the value where nothing else reads it, else into a multiplication.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from graphopt.ir.graph import arguments, constant
from graphopt.passes.layers.weighted_call import uses
from graphopt.passes.weight_only.blocks import portions, to_integers, to_reals
from graphopt.passes.weight_only.rounding import choose_scales
from graphopt.quantization.formats import IntegerFormat

aten = torch.ops.aten
_EXPONENTS = 20  # tried, from 0 on
_SMALLEST = 1e-4  # of the largest input: smaller ones count as that
_NORMS = (aten.layer_norm.default, aten.rms_norm.default)


def input_scales(matrices: Sequence[tuple[Tensor, IntegerFormat]], moments: Tensor) -> Tensor | None:
    """Return what the inputs are divided by, (columns,) float32; None where nothing is better.

    Args:
        matrices: weights (rows, columns) that read the same value, and how they are stored.
        moments: E[x x^T] of it, (columns, columns) float64.
    """
    size = moments.diagonal().clamp(min=0).sqrt().float()
    size = size.clamp(min=_SMALLEST * float(size.max()))
    if not bool(torch.isfinite(size).all()) or float(size.max()) == 0:
        return None
    best, least = None, sum(product_error(matrix, _rounded(matrix, form), moments) for matrix, form in matrices)
    for step in range(1, _EXPONENTS + 1):
        scales = size.pow(step / _EXPONENTS)
        scales = scales / (scales.max() * scales.min()).sqrt()
        error = sum(
            product_error(matrix, _rounded(matrix * scales, form) / scales, moments) for matrix, form in matrices
        )
        if error < least:
            best, least = scales, error
    return best


def product_error(matrix: Tensor, other: Tensor, moments: Tensor) -> float:
    """Return E of the squared difference of the products with two matrices, summed over outputs."""
    total = 0.0
    for rows in portions(matrix):
        change = (matrix[rows] - other[rows]).double()
        total += float(((change @ moments) * change).sum())
    return total


def norm_of(value: fx.Node, readers: Sequence[fx.Node], gm: fx.GraphModule) -> str:
    """Return the norm that can take in factors of a value's features; "" if it is none, or others read it too."""
    if value.target not in _NORMS or set(value.users) != set(readers):
        return ""
    given = arguments(value, ())
    weight, bias = given["weight"], given.get("bias")
    if not isinstance(weight, fx.Node) or len(given["normalized_shape"]) != 1:
        return ""
    own = all(
        constant(part, gm) is not None and uses(gm, str(part.target)) == [value]
        for part in (weight, bias)
        if isinstance(part, fx.Node)
    )
    return value.name if own else ""


def _rounded(matrix: Tensor, form: IntegerFormat) -> Tensor:
    scales = choose_scales(matrix, form, "rtn")
    return to_reals(to_integers(matrix, scales, form), scales, form)
