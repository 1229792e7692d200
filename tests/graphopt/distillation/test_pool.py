"""Pools of samples and views of images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphopt.capturing.capture import capture
from graphopt.data.batches import Batch
from graphopt.distillation.augment import channel_axis, flip, shift
from graphopt.distillation.pool import Pool
from graphopt.testing import TensorSamples


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(count: int) -> Pool:
    return Pool.read(TensorSamples((torch.arange(count), torch.arange(count) * 10)), None)


def sizes(batches: list[Batch]) -> list[int]:
    return [len(batch[0]) for batch in batches]


def test_batches_are_even_and_hold_every_sample_once() -> None:
    pool = numbers(10)
    batches = [pool.take(index) for index in pool.batches(4)]
    assert sizes(batches) == [4, 3, 3]
    assert torch.cat([batch[0] for batch in batches]).tolist() == list(range(10))
    shuffled = [pool.take(index) for index in pool.batches(4, drawn())]
    seen = torch.cat([batch[0] for batch in shuffled])
    assert sorted(seen.tolist()) == list(range(10))
    assert seen.tolist() != list(range(10))
    assert all(torch.equal(batch[1], batch[0] * 10) for batch in shuffled)


def test_the_same_generator_draws_the_same_batches() -> None:
    pool = numbers(20)
    once, again = (torch.cat([index for _, index in pool.batches(6, drawn(3))]) for _ in range(2))
    assert torch.equal(once, again)


def test_batches_of_a_least_size_are_rather_larger_and_leave_out_what_is_alone() -> None:
    pool = Pool((*numbers(5).buckets, *numbers(1).buckets))
    assert sizes([pool.take(index) for index in pool.batches(2)]) == [2, 2, 1, 1]
    assert sizes([pool.take(index) for index in pool.batches(2, fewest=2)]) == [3, 2]
    assert pool.left_out(2).endswith("1 of 6 samples are left out")
    assert not pool.left_out(1)


def test_a_fixed_size_leaves_the_rest_out() -> None:
    assert sizes([numbers(10).take(index) for index in numbers(10).batches(4, takes=lambda _: 4)]) == [4, 4]


def test_samples_of_unlike_length_are_never_in_one_batch() -> None:
    class Texts:
        def batches(self, batch_size: int, limit: int | None = None) -> list[Batch]:
            return [(torch.zeros(3, 5),), (torch.zeros(2, 7),), (torch.ones(1, 5),)]

    pool = Pool.read(Texts(), None)  # type: ignore[arg-type]
    assert [bucket[0].shape for bucket in pool.buckets] == [(4, 5), (2, 7)]
    assert {tuple(pool.take(index)[0].shape) for index in pool.batches(3, drawn())} == {(2, 5), (2, 7)}


def test_flip_mirrors_some_images_and_no_other_axis() -> None:
    images = torch.arange(8 * 3 * 16 * 16.0).view(8, 3, 16, 16)
    result = flip(images, drawn())
    mirrored = [bool(torch.equal(one, other.flip(2))) for one, other in zip(result, images, strict=True)]
    kept = [bool(torch.equal(one, other)) for one, other in zip(result, images, strict=True)]
    assert any(mirrored)
    assert any(kept)
    assert all(one != other for one, other in zip(mirrored, kept, strict=True))


def test_shift_moves_each_image_and_repeats_its_border() -> None:
    images = torch.full((32, 1, 16, 16), 7.0)
    images[:, :, 8, 8] = 9.0
    result = shift(images, drawn())
    assert set(result.unique().tolist()) == {7.0, 9.0}  # nothing from outside
    places = {tuple((image[0] == 9).nonzero()[0].tolist()) for image in result}
    assert all(6 <= row <= 10 and 6 <= column <= 10 for row, column in places)
    assert len(places) > 4


@pytest.mark.parametrize(
    ("example", "axis"),
    [
        (torch.zeros(2, 3, 16, 16), 1),
        (torch.zeros(2, 16, 16, 3, dtype=torch.uint8), 3),
        (torch.zeros(2, 8, 16, 16), None),
        (torch.zeros(2, 3, 16), None),
        (torch.zeros(2, 3, 16, 16, dtype=torch.int64), None),
    ],
)
def test_what_looks_like_images(example: torch.Tensor, axis: int | None) -> None:
    assert channel_axis(capture(nn.ReLU(), example)) == axis
