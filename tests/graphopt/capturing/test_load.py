"""Data that a module is captured on: a list holds batches, and single samples in it are told apart from them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphopt.capturing.capture import capture
from graphopt.capturing.load import with_data
from graphopt.errors import DataError


class Fixed(nn.Module):
    """Takes batches of four alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(4, 8) * 2


@pytest.mark.parametrize(
    ("model", "shape"), [(nn.Linear(8, 4), (8,)), (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (3, 8, 8))]
)
def test_a_list_of_single_samples_is_refused(model: nn.Module, shape: tuple[int, ...]) -> None:
    data = torch.randn(5, *shape)
    with pytest.raises(DataError, match=r"a list of 5 single samples of shape \(.*torch\.stack\(data\)"):
        with_data(model, [*data])
    program, _ = with_data(model, torch.stack([*data]))
    assert program.batch_size is None
    with pytest.raises(DataError, match=r"batches, not samples: put samples together, as in `torch\.stack\(data\)`"):
        with_data(program, [*data])


def test_batches_of_a_fixed_size_are_no_single_samples() -> None:
    program, samples = with_data(Fixed(), [torch.randn(4, 8), torch.randn(4, 8)])
    assert program.batch_size == 4
    assert samples is not None
    assert samples.names == ("x",)


def test_a_sample_without_its_axis_keeps_the_other_advice() -> None:
    with pytest.raises(DataError, match="The first axis must count samples: add one"):
        with_data(capture(nn.Linear(8, 4), torch.randn(2, 8)), torch.randn(8))
