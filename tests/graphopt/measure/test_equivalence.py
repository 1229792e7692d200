"""Distance between outputs: exact numbers on small cases, and what must not pass for equal."""

from __future__ import annotations

import math

import pytest
import torch

from graphopt.errors import VerifyError
from graphopt.ir.signature import TensorSpec
from graphopt.measure.equivalence import compare_outputs

SPEC = (TensorSpec("logits", ("batch", 3), torch.float32),)


def test_equal_outputs() -> None:
    out = torch.tensor([[1.0, 2.0, 4.0]])
    found = compare_outputs(SPEC, (out,), (out.clone(),))
    assert (found.max_error, found.relative, found.sqnr, found.agreement) == (0.0, 0.0, math.inf, 1.0)


def test_a_known_difference() -> None:
    found = compare_outputs(SPEC, (torch.tensor([[3.0, 4.0, 0.0]]),), (torch.tensor([[3.0, 4.5, 0.0]]),))
    assert found.max_error == 0.5
    assert found.relative == 0.125
    assert found.sqnr == pytest.approx(10 * math.log10(25 / 0.25))
    assert found.agreement == 1.0


def test_agreement_counts_rows() -> None:
    want = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    got = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.9, 0.1]])
    assert compare_outputs(SPEC, (want,), (got,)).agreement == 0.75


def test_equal_infinities_are_no_error() -> None:
    want = torch.tensor([[1.0, -math.inf, 0.5]])
    found = compare_outputs(SPEC, (want,), (want.clone(),))
    assert found.max_error == 0.0


def test_nan_is_never_equal() -> None:
    with pytest.raises(VerifyError, match="Output `logits` is NaN or infinite where the original is finite"):
        compare_outputs(SPEC, (torch.ones(1, 3),), (torch.tensor([[1.0, math.nan, 1.0]]),))


def test_error_of_a_zero_output_is_infinite_not_nothing() -> None:
    assert compare_outputs(SPEC, (torch.zeros(1, 3),), (torch.full((1, 3), 1e-9),)).relative == math.inf


def test_no_agreement_for_scalars_and_integers() -> None:
    assert compare_outputs(SPEC, (torch.ones(4),), (torch.ones(4),)).agreement is None
    whole = torch.ones(4, 3, dtype=torch.int64)
    assert compare_outputs(SPEC, (whole,), (whole,)).agreement is None


def test_places_and_classes_do_not_count_as_errors_beside_numbers() -> None:
    specs = (*SPEC, TensorSpec("places", (2,), torch.int64))
    numbers, places = torch.ones(1, 3), torch.tensor([0, 31])
    found = compare_outputs(specs, (numbers, places), (numbers + 0.5, places.flip(0)))
    assert found.max_error == 0.5
    assert compare_outputs(specs[1:], (places,), (places.flip(0),)).max_error == 31.0


def test_an_infinity_that_is_missing_is_an_error_without_bound() -> None:
    masked, unmasked = torch.tensor([[1.0, 2.0, -math.inf]]), torch.tensor([[1.0, 2.0, 3.0]])
    assert compare_outputs(SPEC, (masked,), (unmasked,)).sqnr == -math.inf
