"""Codes chosen one after another make products more exact than codes chosen each on its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphopt.passes.codes.choosing import encode
from graphopt.passes.codes.coded import Form
from graphopt.passes.codes.in_order import Inputs

ROWS, COLUMNS = 24, 45


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def alike(groups: int) -> Tensor:
    """Return second moments of inputs that have much in common, others in each group."""
    x = torch.randn(groups, 400, 12, generator=generator(), dtype=torch.float64)
    x = x @ torch.randn(groups, 12, COLUMNS, generator=generator(), dtype=torch.float64)
    x += 0.1 * torch.randn(groups, 400, COLUMNS, generator=generator(), dtype=torch.float64)
    return x.mT @ x / 400


def inputs_of(moments: Tensor, *, known: bool = True) -> Inputs:
    squares = moments.diagonal(dim1=1, dim2=2).repeat_interleave(ROWS // len(moments), 0).float()
    return Inputs(squares, list(moments) if known else [])


def error(change: Tensor, moments: Tensor) -> float:
    """Return the mean squared change of products."""
    grouped = change.double().reshape(len(moments), -1, COLUMNS)
    return float(((grouped @ moments) * grouped).sum())


FORMS = {
    "one table": Form("kmeans", 4, 1, ROWS),
    "a table for each row": Form("kmeans", 4, 1, 1),
    "the last table of fewer rows": Form("kmeans", 8, 1, 7),
    "vectors, the last filled up": Form("kmeans", 64, 2, ROWS),
    "vectors in several tables": Form("kmeans", 16, 2, 7),
    "ternary": Form("ternary", 3, 1, ROWS),
    "binary": Form("binary", 2, 1, ROWS),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("groups", [1, 3])
def test_products_are_more_exact(form: Form, groups: int) -> None:
    matrix, moments = torch.randn(ROWS, COLUMNS, generator=generator()), alike(groups)
    each, ordered = (
        encode(matrix, form, inputs_of(moments, known=known), generator()).reals(form, COLUMNS) - matrix
        for known in (False, True)
    )
    assert error(ordered, moments) < 0.6 * error(each, moments)


@pytest.mark.parametrize("form", [FORMS["a table for each row"], Form("kmeans", 4, 2, 1)], ids=str)
def test_inputs_that_have_nothing_in_common_leave_the_nearest_entries(form: Form) -> None:
    matrix, moments = torch.randn(ROWS, COLUMNS, generator=generator()), torch.eye(COLUMNS).double().unsqueeze(0)
    each, ordered = (encode(matrix, form, inputs_of(moments, known=known), generator()) for known in (False, True))
    assert torch.equal(each.codes, ordered.codes)
    assert torch.equal(each.table, ordered.table)


def test_rows_of_zeros_stay_zeros_and_inputs_of_zeros_say_nothing() -> None:
    matrix = torch.randn(ROWS, COLUMNS, generator=generator())
    matrix[0] = 0
    for moments in (alike(1), torch.zeros(1, COLUMNS, COLUMNS).double()):
        for form in FORMS.values():
            found = encode(matrix, form, inputs_of(moments), generator()).reals(form, COLUMNS)
            assert bool(torch.isfinite(found).all())
            assert float(found[0].abs().max()) < 1e-6
