"""GPTQ: what it rounds to depends on how inputs go together, not on how large they are."""

from __future__ import annotations

import pytest
import torch

from graphopt.passes.layers.gptq import round_in_order
from graphopt.quantization.formats import IntegerFormat

FORM = IntegerFormat(4, narrow=True)


def rounded(moments: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    scale = torch.full_like(matrix, 0.2)
    return round_in_order(matrix, scale, torch.zeros_like(scale), FORM, moments, 0.01)


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 6, generator=generator, dtype=torch.float64) @ torch.randn(
        6, 6, generator=generator, dtype=torch.float64
    )
    return inputs.T @ inputs / 64, torch.randn(5, 6, generator=generator)


@pytest.mark.parametrize("size", [1e-80, 1e-310, 1e80])
def test_inputs_of_any_size_round_alike(size: float) -> None:
    """Denormals in float32 have moments of 1e-80, whose inverse float32 cannot hold."""
    moments, matrix = drawn()
    wanted = rounded(moments, matrix)
    assert not torch.equal(wanted, rounded(torch.zeros_like(moments), matrix))
    # moments of 1e-310 have few digits left
    off = (rounded(moments * size, matrix) - wanted).abs()
    assert int(off.max()) <= (1 if size == 1e-310 else 0)


def test_inputs_that_are_zero_leave_the_nearest_integers() -> None:
    moments, matrix = drawn()
    nearest = (matrix / 0.2).round().clamp(FORM.low, FORM.high)
    assert torch.equal(rounded(torch.zeros_like(moments), matrix).float(), nearest)
