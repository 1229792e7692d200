"""Losses: zero at agreement, known values, what they do not depend on, and which one shapes allow."""

from __future__ import annotations

import math

import pytest
import torch

from graphopt.distillation.losses import (
    attention,
    relative_error,
    similarity,
    soft_labels,
    tap_loss,
    tap_loss_for,
)


def test_soft_labels_is_the_divergence_times_the_squared_temperature() -> None:
    student, teacher = torch.zeros(1, 2), torch.tensor([[2 * math.log(3.0), 0.0]])
    # at temperature 2 the teacher says (3/4, 1/4) and the student (1/2, 1/2)
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(soft_labels(student, teacher, 2.0)) == pytest.approx(4 * divergence, rel=1e-5)


def test_soft_labels_averages_rows_of_any_rank() -> None:
    student, teacher = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    whole = soft_labels(student, teacher, 3.0)
    torch.testing.assert_close(whole, soft_labels(student.view(12, 5), teacher.view(12, 5), 3.0))
    assert float(soft_labels(teacher, teacher, 3.0)) == pytest.approx(0, abs=1e-6)


def test_relative_error_is_free_of_scale_and_skips_what_is_masked() -> None:
    student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]])
    assert float(relative_error(student, teacher)) == pytest.approx(4 / 17)
    assert float(relative_error(1000 * student, 1000 * teacher)) == pytest.approx(4 / 17)
    masked = torch.tensor([[1.0, -math.inf]])
    assert float(relative_error(masked, masked)) == 0.0


def test_a_masked_entry_has_no_gradient() -> None:
    student = torch.tensor([[1.0, -math.inf]], requires_grad=True)
    relative_error(student, torch.tensor([[2.0, -math.inf]])).backward()
    assert torch.equal(student.grad, torch.tensor([[-0.5, 0.0]]))  # type: ignore[arg-type]


def test_attention_compares_maps_of_different_width() -> None:
    teacher = torch.rand(3, 8, 4, 4)
    assert float(attention(teacher.repeat(1, 2, 1, 1), teacher, 1)) == pytest.approx(0, abs=1e-6)
    assert float(attention(teacher.flip(3), teacher, 1)) > 1e-3


def test_similarity_compares_samples_whatever_the_width() -> None:
    teacher = torch.randn(6, 8)
    rotation = torch.linalg.qr(torch.randn(8, 8))[0]
    padded = torch.cat([teacher @ rotation, torch.zeros(6, 3)], 1)
    assert float(similarity(padded, teacher)) == pytest.approx(0, abs=1e-5)
    assert float(similarity(teacher.flip(0), teacher)) > 1e-3


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ((4, 8, 5, 5), (4, 8, 5, 5), ("values", 0)),
        ((4, 6, 5, 5), (4, 8, 5, 5), ("attention", 1)),
        ((4, 7, 12), (4, 7, 16), ("attention", 2)),
        ((4, 6), (4, 8), ("similarity", 0)),
        ((4, 6, 3, 3), (4, 8, 5, 5), ("similarity", 0)),
    ],
)
def test_shapes_decide_the_loss(student: tuple[int, ...], teacher: tuple[int, ...], expected: object) -> None:
    assert tap_loss_for(student, teacher) == expected
    one, other = torch.randn(student, requires_grad=True), torch.randn(teacher)
    loss = tap_loss(one, other)
    loss.backward()
    assert loss.dim() == 0
    assert loss.item() > 0
    assert one.grad is not None
    assert bool(torch.isfinite(one.grad).all())
