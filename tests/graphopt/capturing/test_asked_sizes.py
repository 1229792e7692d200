"""Models that decide by a size: what was traced of them is no program for the other sizes."""

from __future__ import annotations

import operator
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


def test_sizes_are_tried_within_their_range() -> None:
    model = Deciding(multiple(1)).eval()
    program = graphopt.capture(model, X, dynamic_shapes=({1: Dim.DYNAMIC(min=6, max=9)},))
    assert program.inputs[0].shape[1] == "x_1"
    with pytest.raises(CaptureError, match="at size 10 of axis 1"):
        graphopt.capture(model, X, dynamic_shapes=({1: Dim.DYNAMIC(min=6, max=12)},))


def test_other_sizes_are_tried_where_the_model_fails() -> None:
    def not_five(net: nn.Module, x: Tensor) -> Tensor:
        if x.shape[1] == 5:
            raise ValueError("not 5 steps")
        return multiple(1)(net, x)

    with pytest.raises(CaptureError, match="at size 10 of axis 1"):
        graphopt.capture(Deciding(not_five).eval(), X, dynamic_shapes=({1: Dim.DYNAMIC},))


def test_multiples_of_what_is_no_axis_are_tried() -> None:
    with pytest.raises(CaptureError, match="at size 16 of axis 1"):
        graphopt.capture(Deciding(branch(1)).eval(), X, dynamic_shapes=({1: 2 * Dim("pairs", max=20)},))


class Comparing(nn.Module):
    """Another layer for the second input, by how the sizes of an axis compare."""

    def __init__(self, compare: Callable[[int, int], bool], axis: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.compare, self.axis, self.one, self.two = compare, axis, nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        layer = self.one if self.compare(x.shape[self.axis], y.shape[self.axis]) else self.two
        return self.one(x).mean((0, 1)) + layer(y).mean((0, 1))


PAIR = torch.randn(3, 3, 8), torch.randn(5, 5, 8)


@pytest.mark.parametrize(
    ("compare", "sizes"), [(operator.ne, (5, 5)), (operator.lt, (5, 5)), (lambda a, b: a * b != 34, (2, 17))]
)
def test_sizes_of_two_axes_are_tried_together(compare: Callable[[int, int], bool], sizes: tuple[int, int]) -> None:
    shapes = {"x": {1: Dim.DYNAMIC}, "y": {1: Dim.DYNAMIC}}
    with pytest.raises(CaptureError, match="at size {} of axis 1 of `x` and size {} of axis 1 of `y`".format(*sizes)):
        graphopt.capture(Comparing(compare, 1).eval(), PAIR, dynamic_shapes=shapes)


def test_first_axes_that_are_compared_are_fixed() -> None:
    program = graphopt.capture(Comparing(operator.ne, 0).eval(), PAIR, dynamic_shapes={"y": {0: Dim.DYNAMIC}})
    assert [spec.shape[0] for spec in program.inputs] == [3, 5]
    (note,) = program.notes
    assert "at size 5 of axis 0 of `x` and size 5 of axis 0 of `y` the captured program differs" in note.text


def test_a_batch_that_must_be_a_multiple_is_fixed() -> None:
    threes = Deciding(lambda net, x: net.one(x).reshape(-1, 3, 24)).eval()
    (note,) = graphopt.capture(threes, X[:, :3].repeat(2, 1, 1)[:6]).notes
    assert note.text.startswith(
        "The batch size is fixed: at batch 5 the model fails (RuntimeError: shape '[-1, 3, 24]'"
    )


def test_a_division_by_zero_asks_nothing() -> None:
    pooled = Deciding(lambda net, x: net.one(x.reshape(x.shape[0], x.shape[1] // 3, 3, 8).mean(2)))
    program = graphopt.capture(pooled.eval(), X, dynamic_shapes=({1: Dim.DYNAMIC},))
    assert program.inputs[0].shape[1] == "x_1"


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        (lambda n: round(n / 4) < 5, 19),
        (lambda n: n**0.5 < 5, 25),
        (lambda n: (n | 1) < 20, 20),
        (lambda n: 2**n < 2**70, 70),
        (lambda n: n**12 < 10**20, 47),
        (lambda n: int(n / 3) < 5, None),
    ],
)
def test_whatever_function_of_a_size_is_asked_about_is_computed(asked: Callable[[int], bool], size: int | None) -> None:
    model = Deciding(lambda net, x: net.one(x) if asked(x.shape[1]) else net.two(x))
    with pytest.raises(CaptureError, match=f"at size {size or '[0-9]+'} of axis 1"):
        graphopt.capture(model.eval(), X[:, :6], dynamic_shapes=({1: Dim.DYNAMIC},))


def test_a_question_is_noted_though_a_harmless_one_before_implies_its_answer() -> None:
    twice = Deciding(lambda net, x: branch(1)(net, x if x.shape[1] < 12 else x + 0.0))
    with pytest.raises(CaptureError, match="at size 16 of axis 1"):
        graphopt.capture(twice.eval(), X, dynamic_shapes=({1: Dim.DYNAMIC},))


@pytest.mark.parametrize("dim", [Dim.DYNAMIC, "steps", Dim("steps", max=9)])
def test_an_axis_that_is_decided_by_at_one_is_of_two_or_more(dim: object) -> None:
    single = Deciding(lambda net, x: net.one(x).mean(1) if x.shape[1] > 1 else net.two(x).sum(1))
    program = graphopt.capture(single.eval(), X, dynamic_shapes=({1: dim},))
    assert program.inputs[0].range_of(1).least == 2
    assert [note.text for note in program.notes if "2 or more" in note.text or "2 to 9" in note.text]
    alike = Deciding(lambda net, x: net.one(x).mean(1) if x.shape[1] > 1 else net.one(x)[:, 0])
    assert graphopt.capture(alike.eval(), X, dynamic_shapes=({1: dim},)).inputs[0].range_of(1).least == 0
