"""Dynamic axes take the structure of the arguments; arguments of another structure are told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from graphopt.errors import CaptureError
from graphopt.ir.dynamic_axes import arranged


class Nested(nn.Module):
    def forward(self, pair: tuple[torch.Tensor, torch.Tensor], scale: float, mask: torch.Tensor) -> torch.Tensor:
        return pair[0] * scale + pair[1] * mask


X = torch.ones(2)


def test_axes_take_the_structure_of_the_arguments() -> None:
    found = arranged(Nested(), ((X, X), 2.0), {"mask": X}, [{0: "a"}, {}, {0: "b"}])
    assert found == {"pair": ({0: "a"}, None), "scale": None, "mask": {0: "b"}}


@pytest.mark.parametrize("pair", [X, (X,), (X, X, X), {"a": {"b": X}}, None])
def test_arguments_of_another_structure(pair: Any) -> None:
    with pytest.raises(CaptureError, match=r"The example inputs hold \d tensors, and the program takes 3"):
        arranged(Nested(), (pair, 2.0), {"mask": X}, [{0: "a"}, {}, {0: "b"}])
