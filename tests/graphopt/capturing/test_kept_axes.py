"""`squeeze` keeps dynamic axes: one sample is as several are, is said to be, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import graphopt
from graphopt.errors import UsageError
from graphopt.ir.sizes import ANY, SizeRange

ROWS = torch.randn(4, 6)
ONE = ROWS[:1]


class Squeezing(nn.Module):
    """A layer, and what is done to (batch, 5)."""

    def __init__(self, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.then = nn.Linear(6, 5), then

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        return self.then(self.layer(x))


@pytest.mark.parametrize(
    "squeeze",
    [
        lambda z: z.squeeze(),
        lambda z: z.squeeze(0),
        lambda z: z.squeeze((0,)),
        lambda z: z[:, :, None, None].squeeze(),
        lambda z: z[:, None].squeeze((0, 1)),
    ],
)
def test_the_axis_is_kept_and_said_to_be(squeeze: Callable[[Tensor], Tensor]) -> None:
    model = Squeezing(squeeze).eval()
    result = graphopt.optimize(model, ROWS, "fold", bench=False, check="full")
    program, session = result.program, result.artifact.session()
    for rows in (ONE, ROWS):
        for found in (program(rows), torch.from_numpy(session(rows.numpy())[0])):
            assert found.shape == (len(rows), 5)
            torch.testing.assert_close(found.flatten(), model(rows).flatten())
    (note,) = (note.text for note in program.notes if note.subject == "batch")
    assert note.startswith(
        "Where `batch` is 1, output `output` is (1, 5): it keeps its axes. The model gives (5,), by "
    )


def test_what_gives_the_axis_back_is_no_matter() -> None:
    program = graphopt.capture(Squeezing(lambda z: z.squeeze().reshape(-1, 5)).eval(), ROWS)
    assert program.notes == ()
    assert program.inputs[0].range_of(0) == ANY


@pytest.mark.parametrize("reload", [False, True])
def test_one_sample_is_refused_where_it_gives_other_numbers(reload: bool, tmp_path: Path) -> None:
    program = graphopt.capture(Squeezing(lambda z: z.squeeze().softmax(0)).eval(), ROWS)
    program = graphopt.load(program.save(tmp_path / "program.pt2")) if reload else program
    assert program.inputs[0].range_of(0) == SizeRange(2)
    with pytest.raises(UsageError, match="Axis 0 of input `x` has a size of 1, and the program is of 2 or more"):
        program(ONE)


def test_small_numbers_are_compared_as_closely() -> None:
    """An absolute tolerance would take them for equal."""
    program = graphopt.capture(Squeezing(lambda z: z.squeeze().softmax(0) * 1e-9).eval(), ROWS)
    assert program.inputs[0].range_of(0) == SizeRange(2)


def test_a_file_of_another_is_treated_alike(tmp_path: Path) -> None:
    model = Squeezing(lambda z: z.squeeze().softmax(0)).eval()
    torch.export.save(torch.export.export(model, (ROWS,), dynamic_shapes=({0: Dim("rows")},)), tmp_path / "own.pt2")
    assert graphopt.load(tmp_path / "own.pt2").inputs[0].range_of(0) == SizeRange(2)


@pytest.mark.parametrize(("then", "least"), [(lambda z: z, 2), (lambda z: z[:, 1:], 3)])
def test_of_another_axis_sizes_that_make_it_one_are_left_out(then: Callable[[Tensor], Tensor], least: int) -> None:
    model = Squeezing(lambda z: then(z).squeeze(1).softmax(1)).eval()
    steps = {"x": {1: Dim.DYNAMIC}}
    program = graphopt.capture(model, (torch.randn(3, 6, 6),), dynamic_shapes=steps)
    assert [program.inputs[0].range_of(axis) for axis in (0, 1)] == [ANY, SizeRange(least)]


@pytest.mark.parametrize("then", [lambda z: z.nonzero().squeeze() + 0, lambda z: z[z[:, 0] > 0].squeeze(0) * 2])
def test_what_depends_on_data_is_squeezed_as_it_comes(then: Callable[[Tensor], Tensor]) -> None:
    class Chosen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return then(x)

    one, two = torch.tensor([[0.0, 0], [3, 0], [0, 0]]), torch.tensor([[0.0, 2], [3, 0], [1, 0]])
    for example in (one, two):
        program = graphopt.capture(Chosen(), example)
        folded = graphopt.optimize(program, None, "fold", None).program
        for x in (one, two):
            assert torch.equal(program(x), then(x))
            assert torch.equal(folded(x), then(x))
