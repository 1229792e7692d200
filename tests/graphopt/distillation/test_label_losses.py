"""Losses against labels: torch's own, wherever classes are, and of a batch in parts what they are of the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from graphopt.capturing.capture import capture
from graphopt.distillation.augment import LabelColumn, view_of
from graphopt.distillation.label_losses import LabelLoss, shares_of
from graphopt.distillation.objective import Target
from graphopt.errors import DataError

DRAWN = torch.Generator().manual_seed(0)


def loss(axis: int, name: str = "auto", *, fixed: bool = False) -> LabelLoss:
    return LabelLoss(name, Target(0, "output", "logits", axis), fixed)


def classes(*shape: int) -> Tensor:
    return torch.randint(0, 5, shape, generator=DRAWN)


@pytest.mark.parametrize(("shape", "axis"), [((8, 5), 1), ((8, 6, 5), 2), ((8, 5, 6), 1), ((8, 5, 6, 5), 1)])
def test_cross_entropy_is_torchs_own_with_labels_left_out(shape: tuple[int, ...], axis: int) -> None:
    outputs = torch.randn(shape, generator=DRAWN)
    labels = classes(*shape[:axis], *shape[axis + 1 :])
    labels.view(-1)[::3] = -100
    torch.testing.assert_close(loss(axis)(outputs, labels), cross_entropy(outputs.movedim(axis, 1), labels))
    shares = torch.rand(shape, generator=DRAWN)
    expected = cross_entropy(outputs.movedim(axis, 1), shares.movedim(axis, 1))
    torch.testing.assert_close(loss(axis, "cross_entropy")(outputs, shares), expected)


def test_labels_tell_the_axis_where_the_layer_is_wrong_and_the_user_goes_before_both() -> None:
    outputs, labels = torch.randn(8, 5, 7, generator=DRAWN), classes(8, 7)
    torch.testing.assert_close(loss(2)(outputs, labels), cross_entropy(outputs, labels))
    with pytest.raises(DataError, match=r"of class numbers \[8, 5\] for outputs \[8, 5, 7\].* say which `axis`"):
        loss(2, fixed=True)(outputs, labels)
    square = torch.randn(8, 5, 5, generator=DRAWN)
    torch.testing.assert_close(
        loss(2)(square, classes_of := classes(8, 5)), cross_entropy(square.movedim(2, 1), classes_of)
    )


@pytest.mark.parametrize("mixed", [False, True])
def test_parts_of_a_batch_make_the_mean_over_all_of_its_labels(mixed: bool) -> None:
    outputs, labels = torch.randn(8, 5, 6, generator=DRAWN), classes(8, 6)
    labels[:2] = labels[5, 1:] = -100
    if mixed:
        labels = shares_of(labels, 5, 1)
    of_batch = loss(1, "cross_entropy")
    density = of_batch.density([labels])
    parts = [
        of_batch(part, own, density) * len(part) / 8
        for part, own in zip(outputs.split(2), labels.split(2), strict=True)
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), of_batch(outputs, labels))
    assert parts[0] == 0  # of none
    nothing = torch.full_like(labels, 0 if mixed else -100)
    assert of_batch(outputs, nothing) == 0


def test_mixed_images_have_shares_of_classes_where_the_output_has_them_and_none_of_what_is_left_out() -> None:
    images, labels = torch.randn(4, 3, 16, 16, generator=DRAWN), classes(4, 16, 16)
    labels[:, 0] = -100
    view = view_of(["mixup"], capture(nn.Conv2d(3, 5, 1), images), LabelColumn(1, 5, 1, 3))
    shares = view((images, labels), torch.Generator().manual_seed(1))[1]
    assert shares.shape == (4, 5, 16, 16)
    torch.testing.assert_close(shares.sum(1), (labels != -100).float())


def test_class_numbers_may_be_bytes() -> None:
    outputs, labels = torch.randn(4, 200, generator=DRAWN), torch.tensor([3, 156, 156, 199])
    torch.testing.assert_close(loss(1)(outputs, labels.to(torch.uint8)), cross_entropy(outputs, labels))
    assert torch.equal(shares_of(labels.to(torch.uint8), 200, 1), shares_of(labels, 200, 1))


def test_values_of_another_layout_are_refused() -> None:
    outputs = torch.randn(4, 3, 8, 8, generator=DRAWN)
    with pytest.raises(DataError, match="mean squared error is of as many labels as outputs"):
        loss(1, "mse")(outputs, outputs.permute(0, 2, 3, 1))
    assert loss(1, "mse")(outputs[:, :1], outputs[:, 0]) == 0


def test_complex_labels_are_refused() -> None:
    with pytest.raises(DataError, match="Labels are complex"):
        LabelLoss("auto", Target(0, "y", "logits", 1))(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.complex64))
