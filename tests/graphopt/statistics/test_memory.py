"""How much memory the values inside a program take."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphopt.capturing.capture import capture
from graphopt.statistics.memory import peak_bytes_per_sample


def test_the_peak_counts_what_is_alive_at_once() -> None:
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.repeat(1, 10).relu().sum(1, keepdim=True)

    found = peak_bytes_per_sample(capture(Wide(), (torch.randn(100, 4)[:2],)))
    assert found == 4 * 40  # bytes of a repeated row; what a node has read for the last time is gone behind it
