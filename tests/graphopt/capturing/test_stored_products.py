"""A product with a stored matrix turned around is a Linear layer, and computes what it did."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphopt.capturing.capture import capture

X = torch.randn(3, 5, 4)


class Multiplied(nn.Module):
    """One product."""

    def __init__(self, multiply: Callable[[Tensor, Tensor], Tensor], *sizes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w, self.multiply = nn.Parameter(torch.randn(sizes)), multiply

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return self.multiply(x, self.w)


@pytest.mark.parametrize(
    ("multiply", "sizes", "linear"),
    [
        (lambda x, w: x @ w.t(), (6, 4), True),
        (lambda x, w: x.matmul(w.T), (6, 4), True),
        (lambda x, w: x[0] @ w.transpose(-1, 0), (4, 4), True),
        (lambda x, w: torch.mm(x[:, 0], w.permute(1, 0)), (6, 4), True),
        (lambda x, w: x[0, 0] @ w.mT, (6, 4), True),
        (lambda x, w: x @ w.permute(0, 1), (4, 4), False),
        (lambda x, w: x @ w, (4, 6), False),
        (lambda x, w: x @ (w + 1).t(), (6, 4), False),
        (lambda x, w: x @ w.transpose(1, 2), (3, 6, 4), False),
        (lambda x, w: w.t() @ x, (5, 6), False),
    ],
)
def test_products(multiply: Callable[[Tensor, Tensor], Tensor], sizes: tuple[int, ...], linear: bool) -> None:
    model = Multiplied(multiply, *sizes)
    program = capture(model, (X,))
    targets = [node.target for node in program.graph.nodes]
    assert (torch.ops.aten.linear.default in targets) is linear
    torch.testing.assert_close(program(X), model(X))
