"""What the text of an option says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt
from graphopt.cli.arguments import _dynamic_shapes
from graphopt.errors import UsageError
from graphopt.ir.sizes import ANY, SizeRange


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("input:1", ANY), ("input:1:4-8", SizeRange(4, 8)), ("input:1:4-", SizeRange(4)), ("input:1:-8", SizeRange(0, 8))],
)
def test_sizes_of_a_dynamic_axis(text: str, sizes: SizeRange) -> None:
    shapes = _dynamic_shapes([text, "input:0:3-"])
    (spec,) = graphopt.capture(nn.ReLU(), torch.randn(3, 5), dynamic_shapes=shapes).inputs
    assert spec.shape == ("batch", "input_1")
    assert [spec.range_of(axis) for axis in (0, 1)] == [SizeRange(3), sizes]


@pytest.mark.parametrize("text", ["x:{}", "x:1:{}-", "x:1:-{}"])
def test_numbers_that_are_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match=r"^Cannot read --dynamic x:.{,80}\. Write"):
        _dynamic_shapes([text.format("9" * 5000)])
