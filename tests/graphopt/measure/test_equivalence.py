"""Distance between outputs: exact numbers on small cases, and what must not pass for equal."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from graphopt import capture
from graphopt.errors import CaptureError, VerifyError
from graphopt.ir.signature import TensorSpec
from graphopt.measure import equivalence
from graphopt.measure.equivalence import Equivalence, Probe, compare_outputs, measure

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


def test_places_and_classes_count_by_how_many_differ() -> None:
    specs = (*SPEC, TensorSpec("places", (4,), torch.int64))
    numbers, places = torch.ones(1, 3), torch.tensor([0, 31, 5, 6])
    moved = torch.tensor([0, 30, 5, 6])
    found = compare_outputs(specs, (numbers, places), (numbers, moved))
    assert (found.max_error, found.relative) == (0.0, 0.25)
    assert found.sqnr == pytest.approx(10 * math.log10(4))
    found = compare_outputs(specs, (numbers, places), (numbers + 0.5, places))
    assert (found.max_error, found.relative) == (0.5, 0.5)
    alone = compare_outputs(specs[1:], (places,), (moved,))
    assert (alone.max_error, alone.relative) == (1.0, 0.25)


@pytest.mark.parametrize(
    ("want", "got", "share"),
    [
        (torch.tensor([True, False]), torch.tensor([True, True]), 0.5),
        (torch.tensor([2**60]), torch.tensor([2**60 + 1]), 1.0),
        (torch.tensor([0, 1], dtype=torch.uint8), torch.tensor([0, 255], dtype=torch.uint8), 0.5),
    ],
)
def test_every_kind_of_integer_is_compared_exactly(want: torch.Tensor, got: torch.Tensor, share: float) -> None:
    spec = (TensorSpec("flags", (2,), want.dtype),)
    assert compare_outputs(spec, (want,), (got,)).relative == share
    assert compare_outputs(spec, (want,), (want.clone(),)).sqnr == math.inf


def test_a_missing_output_is_not_equal() -> None:
    specs = (*SPEC, TensorSpec("score", (1,), torch.float32))
    out, score = torch.ones(1, 3), torch.ones(1)
    found = compare_outputs(specs, (out, score), (out,))
    assert found.differs == ("output `score` is missing",)
    assert (found.max_error, found.relative, found.sqnr) == (math.inf, math.inf, -math.inf)
    assert compare_outputs(specs, (out, score), ()).relative == math.inf


def test_an_output_too_many_is_not_equal() -> None:
    out = torch.ones(1, 3)
    found = compare_outputs(SPEC, (out,), (out, out))
    assert found.differs == ("there are 2 outputs, not 1",)
    assert found.relative == math.inf


@pytest.mark.parametrize("shape", [(), (1, 1), (3,), (2, 3), (1, 1, 3)])
def test_outputs_of_other_shapes_that_broadcast_are_not_equal(shape: tuple[int, ...]) -> None:
    found = compare_outputs(SPEC, (torch.ones(1, 3),), (torch.ones(shape),))
    assert found.differs[0].startswith("output `logits` is float32 of shape ")
    assert (found.relative, found.sqnr, found.agreement) == (math.inf, -math.inf, None)


def test_empty_outputs_of_other_shapes_are_not_equal() -> None:
    empty = torch.ones(0, 3)
    assert compare_outputs(SPEC, (empty,), (torch.ones(0, 4),)).relative == math.inf
    equal = compare_outputs(SPEC, (empty,), (empty.clone(),))
    assert (equal.relative, equal.agreement, equal.differs) == (0.0, None, ())


def test_another_type_is_told_and_its_numbers_are_compared() -> None:
    found = compare_outputs(SPEC, (torch.ones(1, 3),), (torch.full((1, 3), 0.5, dtype=torch.float16),))
    assert found.differs == ("output `logits` is float16 of shape 1x3 instead of float32 of shape 1x3",)
    assert found.relative == 0.5


def test_outputs_in_another_order_are_told() -> None:
    specs = (*SPEC, TensorSpec("score", (1,), torch.float32))
    found = compare_outputs(specs, (torch.ones(1, 3), torch.ones(1)), (torch.ones(1), torch.ones(1, 3)))
    assert len(found.differs) == 2
    assert found.relative == math.inf


def test_complex_outputs_are_compared_in_both_parts() -> None:
    spec = (TensorSpec("spectrum", (2,), torch.complex64),)
    want = torch.tensor([3 + 4j, 0 + 1j])
    found = compare_outputs(spec, (want,), (torch.tensor([3 + 4j, 0 + 2j]),))
    assert (found.max_error, found.relative) == (1.0, pytest.approx(0.2))
    assert compare_outputs(spec, (want,), (want.clone(),)).sqnr == math.inf


def test_undefined_in_both_is_equal_and_in_one_is_not() -> None:
    want = torch.tensor([[math.nan, 1.0, 2.0]])
    assert compare_outputs(SPEC, (want,), (want.clone(),)).relative == 0.0
    found = compare_outputs(SPEC, (want,), (torch.tensor([[7.0, 1.0, 2.0]]),))
    assert (found.max_error, found.relative, found.sqnr) == (math.inf, math.inf, -math.inf)
    with pytest.raises(VerifyError):  # elsewhere than in the original
        compare_outputs(SPEC, (want,), (torch.tensor([[math.nan, math.nan, 2.0]]),))


class Ties(nn.Module):
    """Of two equal values, rounding decides which is the larger; of two others it does not."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        near = torch.stack([x[:, 0] * 3.0 * (1 / 3.0), x[:, 1]], -1)
        return near.argmax(-1), x[:, 2:].argmax(-1)


def test_integers_that_rounding_decides_are_passed_over_on_request() -> None:
    x = torch.tensor([[1.1, 1.1, 1.0, 2.0], [1.3, 1.3, 2.0, 1.0], [1.7, 1.7, 5.0, 6.0], [1.9, 1.9, 6.0, 5.0]])
    program = capture(Ties(), (x,))
    near, far = program.call_flat((x,))

    def flipped(*places: int) -> Equivalence:
        outputs = [1 - value if index in places else value for index, value in enumerate((near, far))]
        return measure(program, lambda _: tuple(outputs), (x,), settled=True)

    assert flipped(0).relative == 0.0
    assert flipped(1).relative == 1.0
    assert measure(program, lambda _: (near * 0 + 7, far), (x,), settled=True).relative == 1.0  # no answer of the tie
    narrow = measure(program, lambda _: ((1 - near).int(), far), (x,), settled=True)
    assert narrow.relative == 0.0
    assert narrow.differs  # its type is told all the same


def test_no_more_answers_are_asked_for_than_there_are_open_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.tensor([[1.1, 1.1, 1.0, 2.0]])
    program = capture(Ties(), (x,))
    near, far = program.call_flat((x,))
    seeds: list[int] = []
    nudged = equivalence._nudged
    monkeypatch.setattr(equivalence, "_nudged", lambda batch, seed: (seeds.append(seed), nudged(batch, seed))[1])
    assert measure(program, lambda _: (1 - near, far), (x,), settled=True).relative == 0.0
    assert 0 < len(seeds) < 16
    assert measure(program, lambda _: (1 - near, far), (x,)).relative == 1.0


def test_outputs_that_only_one_returns_are_passed_over_on_request() -> None:
    x = torch.randn(4, 3)
    program = capture(nn.Linear(3, 2).eval(), (x,))
    more = program.call_flat((x,)) * 2
    assert measure(program, lambda _: more, (x,)).relative == math.inf
    assert measure(program, lambda _: more, (x,), declared=program.outputs * 2).relative == 0.0
    assert measure(program, lambda _: (), (x,)).relative == math.inf
    twice = capture(Ties(), (torch.randn(4, 4),))
    first = twice.call_flat(twice.flat_examples())[:1]
    assert measure(twice, lambda _: first, twice.flat_examples(), declared=twice.outputs[:1]).relative == 0.0


@pytest.mark.parametrize(("declared", "returned"), [(2, 0), (2, 1), (1, 0), (1, 2), (3, 1), (2, 3)])
def test_outputs_that_are_declared_and_missing_or_not_declared_are_told(declared: int, returned: int) -> None:
    program = capture(Ties(), (torch.randn(4, 4),))
    batch = program.flat_examples()
    outputs = (*program.call_flat(batch), torch.ones(1))[:returned]
    specs = (*program.outputs, SPEC[0])[:declared]
    found = measure(program, lambda _: outputs, batch, declared=specs)
    assert found.differs
    assert (found.relative, found.sqnr) == (math.inf, -math.inf)


def test_a_reference_that_fails_on_samples_says_so() -> None:
    program = capture(nn.Embedding(4, 2), torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(CaptureError, match=r"fails on 5 .*it takes input: batchx3 int64: IndexError"):
        Probe(program, (torch.full((5, 3), 4),))


def test_an_infinity_that_is_missing_is_an_error_without_bound() -> None:
    masked, unmasked = torch.tensor([[1.0, 2.0, -math.inf]]), torch.tensor([[1.0, 2.0, 3.0]])
    assert compare_outputs(SPEC, (masked,), (unmasked,)).sqnr == -math.inf


def test_whether_the_worst_output_is_one_of_integers() -> None:
    specs = (SPEC[0], TensorSpec("classes", ("batch",), torch.int64))
    values, classes = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 1])
    for got, same, relative, of_integers in (
        (values, classes, 0.0, False),
        (values, classes.flip(0), 1.0, True),
        (values + 2, classes, 0.5, False),
        (values + 1, torch.tensor([0, 0]), 0.5, True),
        (values + 3, torch.tensor([0, 0]), 0.75, False),
    ):
        found = compare_outputs(specs, (values, classes), (got, same))
        assert (found.relative, found.of_integers) == (relative, of_integers)
    assert compare_outputs(specs[1:], (classes,), (classes * 9,)).of_integers  # off by 8, which says nothing
