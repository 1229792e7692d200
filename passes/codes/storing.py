"""Codes of a weight as the tensors and the record of a plan."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.measure.decibels import decibels
from graphopt.passes.codes.coded import Coded, Form, runs
from graphopt.passes.codes.plan import CodesRecord, codes_name
from graphopt.passes.codes.sizes import shape_of_codes
from graphopt.passes.layers.code_packing import bases, pack
from graphopt.passes.layers.matrix_sites import MatrixSite


@dataclass(frozen=True, eq=False)
class StoredCodes:
    """What a plan holds of one weight."""

    record: CodesRecord
    tensors: dict[str, Tensor]


def store(site: MatrixSite, name: str, matrix: Tensor, coded: Coded, form: Form, *, weighted: bool) -> StoredCodes:
    """Pack the codes of a weight, and say how exact they are.

    Args:
        site: the weight.
        name: what its tensors are stored under.
        matrix: what was coded, (rows, columns).
        coded: what came of it.
        form: how it is stored.
        weighted: whether errors were counted by inputs.
    """
    rows, columns = matrix.shape
    shape, parts = shape_of_codes(rows, columns, form, by_rows=bool(site.reads)), bases(form.entries)
    packed = pack(coded.codes.reshape(shape), parts)
    tensors = {codes_name(base): part for base, part in zip(parts, packed, strict=True)}
    tensors["table"] = coded.table
    if coded.scale is not None:
        axes = len(site.calls[0].kernel) if site.calls and site.calls[0].kind == "conv" else 0
        tensors["scale"] = coded.scale.reshape(rows, 1, *[1] * axes)
    if form.group < rows:
        first = coded.first(form)
        tensors["tables"] = first[:: form.group] if rows % form.group == 0 else first
    record = CodesRecord(
        name=name,
        sites=[node.name for node in site.nodes],
        codes=form.codes,
        entries=form.entries,
        parts=list(parts),
        packed_rows=shape[0],
        rows=rows,
        columns=columns,
        vector=form.vector,
        group=form.group,
        weighted=weighted,
        sqnr=_sqnr(matrix, coded, form),
        bytes=[matrix.nbytes, sum(tensor.nbytes for tensor in tensors.values())],
    )
    return StoredCodes(record, {f"{name}.{key}": tensor.contiguous() for key, tensor in tensors.items()})


def _sqnr(matrix: Tensor, coded: Coded, form: Form) -> float | None:
    """Return the signal-to-noise ratio of a weight, None where one of the two is nothing."""
    columns, noise, signal = matrix.shape[1], 0.0, 0.0
    for run in runs(len(matrix), columns):
        noise += float((coded.reals(form, columns, run) - matrix[run]).square().sum(dtype=torch.float64))
        signal += float(matrix[run].square().sum(dtype=torch.float64))
    found = decibels(signal, noise)
    return found if math.isfinite(found) else None
