"""Which axis of an output holds its classes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphopt.capturing.capture import capture
from graphopt.distillation.objective import targets_of


class Heads(nn.Module):
    """Five classes behind a Linear (N, 6, 5), convolutions (N, 5, 6) and (N, 5, 6, 6), and none (N, 6, 4)."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.linear, self.line, self.plane = nn.Linear(4, 5), nn.Conv1d(4, 5, 1), nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        turned = x.transpose(1, 2)
        return self.function(
            self.linear(x), self.line(turned), self.plane(turned[..., None] + turned[:, :, None]), x.relu()
        )


@pytest.mark.parametrize(
    ("function", "kind", "axis"),
    [
        (lambda linear, line, plane, none: linear, "logits", 2),
        (lambda linear, line, plane, none: line, "logits", 1),
        (lambda linear, line, plane, none: plane, "values", 1),
        (lambda linear, line, plane, none: linear.transpose(1, 2), "logits", 1),
        (lambda linear, line, plane, none: plane.permute(0, 2, 3, 1), "values", 3),
        (lambda linear, line, plane, none: plane.flatten(2), "logits", 1),
        (lambda linear, line, plane, none: linear.unflatten(1, (2, 3)), "values", 3),
        (lambda linear, line, plane, none: plane.softmax(1), "probabilities", 1),
        (lambda linear, line, plane, none: line.log_softmax(1).transpose(1, 2), "logits", 2),
        (lambda linear, line, plane, none: line[:, :1], "values", 1),
        (lambda linear, line, plane, none: none, "values", 2),
    ],
)
def test_classes_are_where_the_layer_has_them(function: Callable[..., Tensor], kind: str, axis: int) -> None:
    (target,), _ = targets_of(capture(Heads(function), torch.randn(2, 6, 4)))
    assert (target.kind, target.axis) == (kind, axis)
