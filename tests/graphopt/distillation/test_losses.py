"""Losses: zero at agreement, known values, what they do not depend on, and which one shapes allow."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from graphopt.distillation.losses import (
    angles,
    attention,
    attention_probabilities,
    attention_scores,
    cosine,
    dist,
    distances,
    gumbel_labels,
    relative_error,
    similarity,
    soft_labels,
    tap_loss,
    tap_loss_for,
    value_relations,
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


def test_dist_is_blind_to_scale_and_offset_of_probabilities() -> None:
    rows = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.25, 0.15]], dtype=torch.float64)
    mixed = 0.5 * rows + 0.5 / 3  # the same order and proportions, less sure
    assert float(dist(mixed.log(), rows.log(), 1.0)) == pytest.approx(0, abs=1e-12)
    # classes in reverse correlate by -1 within a row here, and samples within the first and last class too
    turned = torch.tensor([[0.2, 0.3, 0.4], [0.4, 0.3, 0.2]], dtype=torch.float64)
    turned = turned / turned.sum(1, keepdim=True)
    found = float(dist(turned.flip(1).log(), turned.log(), 1.0))
    assert found == pytest.approx(2 + (2 + 1 + 2) / 3)  # the class that is constant correlates with nothing: 1


def test_gumbel_labels_draw_classes_in_the_proportions_of_the_teacher() -> None:
    teacher, student = torch.tensor([[0.7, 0.2, 0.1]]).log().repeat(20000, 1), torch.zeros(20000, 3)
    cold = 1e-4
    drawn = gumbel_labels(student, teacher, cold, torch.Generator().manual_seed(0))
    assert float(drawn) == pytest.approx(cold**2 * math.log(3), rel=1e-3)  # one class each, of three to choose from
    sure = torch.tensor([[50.0, 0.0, 0.0]]).repeat(20000, 1)  # pays T^2 for each draw of another class: (50 + 0) / T
    wrong = gumbel_labels(sure, teacher, cold, torch.Generator().manual_seed(0)) / cold**2 / (50 / cold)
    assert float(wrong) == pytest.approx(0.3, abs=0.01)
    again = gumbel_labels(student, teacher, 1.0, torch.Generator().manual_seed(7))
    assert again == gumbel_labels(student, teacher, 1.0, torch.Generator().manual_seed(7))


def test_cosine_is_of_directions_along_an_axis() -> None:
    teacher = torch.tensor([[[3.0, 0.0], [4.0, 1.0]]])  # (1, channels, places)
    student = torch.tensor([[[6.0, 1.0], [8.0, 0.0]]])
    assert float(cosine(student, teacher, 1)) == pytest.approx(0.5)  # 0 at the first place, 1 at the second


def test_distances_and_angles_compare_shapes_of_a_batch() -> None:
    corner = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    turned = 7 * torch.cat([corner[:, 1:], corner[:, :1], torch.zeros(3, 5)], 1) + 2
    assert float(distances(turned, corner)) == pytest.approx(0, abs=1e-6)
    assert float(angles(turned, corner)) == pytest.approx(0, abs=1e-6)
    line = torch.tensor([[0.0], [1.0], [2.0]])  # distances 1, 1, 2 over 4/3 against 3, 5, 4 over 4
    expected = [3 / 4 - 3 / 4, 3 / 2 - 4 / 4, 3 / 4 - 5 / 4]
    assert float(distances(line, corner)) == pytest.approx(sum(d * d / 2 for d in expected) / 3, rel=1e-5)
    # seen from each sample: cosines 1, -1, 1 on the line; 0, 3/5, 4/5 in the triangle
    huber = [0.5, 1.6 - 0.5, 0.2**2 / 2]
    assert float(angles(line, corner)) == pytest.approx(sum(huber) / 3, rel=1e-5)


@pytest.mark.parametrize("loss", [distances, angles])
def test_too_few_samples_have_no_relations(loss: Callable[..., Tensor]) -> None:
    student = torch.ones(1, 3, requires_grad=True)
    loss(student, torch.zeros(1, 3)).backward()
    assert torch.equal(student.grad, torch.zeros(1, 3))  # type: ignore[arg-type]


def test_attention_scores_leave_out_what_is_masked() -> None:
    teacher = torch.tensor([[[[1.0, -math.inf], [2.0, 3.0]]]])
    student = torch.tensor([[[[2.0, -math.inf], [2.0, 5.0]]]])
    assert float(attention_scores(student, teacher)) == pytest.approx((1 + 0 + 4) / 3)


def test_attention_probabilities_are_a_divergence_for_each_query() -> None:
    teacher, student = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]]), torch.tensor([[[[0.5, 0.5], [0.5, 0.5]]]])
    assert float(attention_probabilities(student, teacher)) == pytest.approx(math.log(2) / 2)


def test_value_relations_are_attention_of_values_to_themselves() -> None:
    teacher = torch.randn(2, 3, 5, 4)
    padded = torch.cat([teacher, torch.zeros(2, 3, 5, 12)], 3) * 2**0.5  # as wide again: the root of four times
    assert float(value_relations(padded, teacher)) == pytest.approx(0, abs=1e-6)
    logits = [value @ value.mT / 2 for value in (teacher.flip(2), teacher)]
    assert float(value_relations(teacher.flip(2), teacher)) == pytest.approx(float(soft_labels(*logits, 1.0)), rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (partial(soft_labels, temperature=3.0), (4, 5)),
        (partial(dist, temperature=2.0), (4, 5)),
        (relative_error, (3, 4)),
        (partial(cosine, axis=1), (3, 4, 2)),
        (partial(attention, axis=1), (3, 4, 2)),
        (similarity, (4, 3)),
        (distances, (5, 3)),
        (angles, (4, 3)),
        (attention_scores, (2, 2, 3, 3)),
        (lambda student, teacher: attention_probabilities(student.softmax(-1), teacher.softmax(-1)), (2, 2, 3, 3)),
        (value_relations, (2, 2, 4, 3)),
    ],
)
def test_gradients_are_of_what_is_returned_and_a_batch_twice_is_a_batch(
    loss: Callable[..., Tensor], shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    assert torch.autograd.gradcheck(lambda value: loss(value, teacher), student.requires_grad_())
    assert float(loss(teacher, teacher).detach()) == pytest.approx(0, abs=1e-9)
    if loss not in (similarity, distances, angles):  # which are of pairs: those of a sample with itself are new
        twice = loss(torch.cat([student, student]), torch.cat([teacher, teacher]))
        if not isinstance(loss, partial) or loss.func is not dist:
            torch.testing.assert_close(twice, loss(student, teacher))


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
