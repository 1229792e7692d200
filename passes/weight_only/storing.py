"""Integers of a weight as the tensors and the record of a plan."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.measure.decibels import decibels
from graphopt.passes.layers.matrix_sites import MatrixSite
from graphopt.passes.weight_only.awq import product_error
from graphopt.passes.weight_only.blocks import Scales, block_size, noise, power, to_reals
from graphopt.passes.weight_only.forms import stored_bits, stored_bytes
from graphopt.passes.weight_only.plan import RowsRecord, stored_as
from graphopt.quantization.formats import IntegerFormat
from graphopt.quantization.ops import pack


@dataclass(frozen=True, eq=False)
class StoredMatrix:
    """What a plan holds of one weight."""

    record: RowsRecord
    tensors: dict[str, Tensor]


def store(
    site: MatrixSite,
    matrix: Tensor,
    integers: Tensor,
    scales: Scales,
    form: IntegerFormat,
    *,
    method: str,
    moments: Tensor | None,
) -> StoredMatrix:
    """Pack the integers of a weight, and say how exact they are.

    Args:
        site: the weight.
        matrix: what was rounded, (rows, columns).
        integers: what came of it.
        scales: of its blocks.
        form: what was stored.
        method: how it was rounded.
        moments: E[x x^T] of what it is multiplied with, if that is known.
    """
    bits = stored_bits(form.bits)
    low = -(1 << bits - 1) if form.symmetric else 0
    zero = scales.zero.to(form.dtype) if not form.symmetric else torch.zeros((), dtype=form.dtype)
    name = stored_as(site.weight_name, form.bits)
    tensors = {
        name: integers if bits == 8 else pack(integers, bits, low),
        f"{name}_scale": scales.scale,
        f"{name}_zero_point": zero if bits == 8 or form.symmetric else pack(zero, bits, low),
    }
    rows, columns = matrix.shape
    record = RowsRecord(
        sites=[node.name for node in site.nodes],
        bits=form.bits,
        stored_bits=bits,
        columns=columns,
        block=block_size(form, columns),
        low=low,
        symmetric=form.symmetric,
        method=method,
        sqnr=_ratio(power(matrix), noise(matrix, integers, scales, form)),
        output_sqnr=None if moments is None else _of_products(matrix, to_reals(integers, scales, form), moments),
        bytes=[matrix.numel() * matrix.element_size(), stored_bytes(rows, columns, form)],
    )
    return StoredMatrix(record, {key: tensor.contiguous() for key, tensor in tensors.items()})


def spread_sqnr(matrix: Tensor, integers: Tensor, scales: Scales, form: IntegerFormat) -> float:
    """Return the power of what tells rows apart over that of what rounding changes, in dB; inf without a change."""
    found = _ratio(power(matrix, matrix.mean(0)), noise(matrix, integers, scales, form))
    return math.inf if found is None else found


def _of_products(matrix: Tensor, rounded: Tensor, moments: Tensor) -> float | None:
    return _ratio(product_error(matrix, torch.zeros_like(matrix), moments), product_error(matrix, rounded, moments))


def _ratio(signal: float, noise: float) -> float | None:
    """Return a signal-to-noise ratio in dB, None where one of them is nothing."""
    found = decibels(signal, noise)
    return found if math.isfinite(found) else None
