"""Refusals name what is wrong: the input, the axis, the weight, and not the data or the mode."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim

import graphopt
from graphopt.errors import CaptureError, UsageError

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_an_infinite_mask_is_no_fault() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0, float("-inf"), 0.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.mean((2, 3)) + self.mask).softmax(-1)

    graphopt.optimize(Masked(), X, "fold", None, bench=False)


def test_a_normalisation_without_statistics_is_not_said_to_be_in_training_mode() -> None:
    norm = nn.BatchNorm2d(32, track_running_stats=False)
    result = graphopt.optimize(nn.Sequential(nn.Conv2d(3, 32, 3), norm), X, "fold", None, bench=False)
    (refusal,) = result.plans[0].refusals
    assert refusal.reason == "it keeps no running statistics, so that it normalises by the batch in evaluation too"


@pytest.mark.parametrize("axis", [3, -1])
def test_a_dynamic_axis_that_the_input_lacks_is_a_usage_error(axis: int) -> None:
    shapes = {"input": {axis: Dim.DYNAMIC}}
    with pytest.raises(UsageError, match=rf"Axis {axis} of input `input` cannot be dynamic: .* \(4, 8\)"):
        graphopt.capture(nn.Linear(8, 4), torch.randn(4, 8), dynamic_shapes=shapes)


def test_a_cache_beside_the_outputs_is_named_with_the_option_that_leaves_it_out() -> None:
    class DynamicCache:
        pass

    class Decoder(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, object]:
            return {"logits": x * 2, "past_key_values": DynamicCache()}

    with pytest.raises(CaptureError, match=r"returns a DynamicCache, .*`model\.config\.use_cache = False`"):
        graphopt.capture(Decoder().eval(), X)


@pytest.mark.parametrize("dim", [Dim.DYNAMIC, Dim("length")])
def test_an_axis_that_another_input_shares_is_named(dim: object) -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return (x * mask).sum(1)

    pair = (torch.randn(4, 9), torch.ones(4, 9))
    with pytest.raises(CaptureError, match=r"axis 1 of `mask`, which is not dynamic\. Add --dynamic mask:1"):
        graphopt.capture(Masked().eval(), pair, dynamic_shapes={"x": {1: dim}})
    with pytest.raises(CaptureError, match=r"Add --dynamic mask:1"):
        graphopt.capture(Masked().eval(), pair, dynamic_shapes={"x": {0: None, 1: dim}, "mask": {0: None}})
    graphopt.capture(Masked().eval(), pair, dynamic_shapes={"x": {1: dim}, "mask": {1: dim}})
