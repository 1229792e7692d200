"""Models that decide by a size: what was traced of them is no program for the other sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import graphopt
from graphopt.errors import CaptureError

Way = Callable[[nn.Module, Tensor], Tensor]
X = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))


class Deciding(nn.Module):
    """Two layers, and a way to take one of them."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.one, self.two = way, nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def pieces(axis: int) -> Way:
    return lambda net, x: torch.cat([net.one(part) for part in torch.split(x, 16, axis)], axis)


def branch(axis: int) -> Way:
    return lambda net, x: net.one(x) if x.shape[axis] < 16 else net.two(x)


def multiple(axis: int) -> Way:
    return lambda net, x: net.two(x) if x.shape[axis] % 5 == 0 else net.one(x)


WAYS = [pieces, branch, multiple]


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_that_is_decided_by_is_fixed(way: Callable[[int], Way]) -> None:
    program = graphopt.capture(Deciding(way(0)).eval(), X)
    assert program.batch_size == 4
    said = [note.text for note in program.notes if note.subject == "batch"]
    assert "the captured program differs from the model" in said[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dim", [Dim.DYNAMIC, "steps"])
def test_another_axis_that_is_decided_by_is_refused(way: Callable[[int], Way], dim: object) -> None:
    with pytest.raises(CaptureError, match=r"at size \d+ of axis 1 of `x` the captured program differs from the model"):
        graphopt.capture(Deciding(way(1)).eval(), X, dynamic_shapes=({1: dim},))


def test_what_is_decided_alike_stays_dynamic() -> None:
    alike = Deciding(lambda net, x: net.one(x) if x.shape[0] < 16 else net.one(x) + 0.0)
    program = graphopt.capture(alike.eval(), X)
    assert program.batch_size is None
    assert torch.allclose(program(X.repeat(5, 1, 1)), alike(X.repeat(5, 1, 1)))


def test_a_model_that_takes_no_such_size_stays_dynamic() -> None:
    def limited(net: nn.Module, x: Tensor) -> Tensor:
        if x.shape[1] > 20:
            raise ValueError("at most 20 steps")
        return net.one(x)

    program = graphopt.capture(Deciding(limited).eval(), X, dynamic_shapes=({1: Dim.DYNAMIC},))
    assert program.inputs[0].shape[1] != 6


def test_a_program_that_fails_where_the_model_does_not_is_not_the_model() -> None:
    way = lambda net, x: net.one(x.view(x.shape[0] // 2, 2, 6, 8)).flatten(0, 1) if x.shape[0] % 2 == 0 else net.one(x)  # noqa: E731
    program = graphopt.capture(Deciding(way).eval(), X)
    assert program.batch_size == 4
