"""Axes that are declared to depend on each other do so in the program, whether or not the model asks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import graphopt
from graphopt.errors import CaptureError, UsageError


class Apart(nn.Module):
    """Two inputs, of any number of rows each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        total: Tensor = self.layer(x).sum((0, 1)) + self.layer(y).amax((0, 1))
        return total


def rows(*counts: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(count, 2, 3) for count in counts)


N = Dim("n", min=2, max=6)


@pytest.mark.parametrize(
    ("dims", "factors", "names"),
    [
        ((N, N), (1, 1), ("batch", "batch")),
        ((N, 2 * N), (1, 2), ("batch", "2*batch")),
        ((2 * N, N), (2, 1), ("2*batch", "batch")),
        ((2 * N, 2 * N), (2, 2), ("2*", "2*")),
        ((2 * N, 3 * N), (2, 3), ("2*", "3*")),
    ],
)
@pytest.mark.parametrize("count", [1, 4])
def test_axes_that_were_exported_as_tied(
    dims: tuple[Any, Any], factors: tuple[int, int], names: tuple[str, str], count: int
) -> None:
    model = Apart().eval()
    exported = torch.export.export(
        model, rows(*(4 * factor for factor in factors)), dynamic_shapes=[{0: d} for d in dims]
    )
    program = graphopt.capture(exported.module(), rows(*(count * factor for factor in factors)))  # type: ignore[arg-type]
    found = [str(spec.shape[0]) for spec in program.inputs]
    assert all(name.startswith(start) for name, start in zip(found, names, strict=True))
    assert len({name.split("*")[-1] for name in found}) == 1
    assert "batch" not in {note.subject for note in program.notes}
    result = graphopt.optimize(program, passes="", bench=False)
    assert result.artifact is not None
    inputs = rows(*(5 * factor for factor in factors))
    want = model(*inputs)
    torch.testing.assert_close(program(*inputs), want)
    np.testing.assert_allclose(result.artifact.session()(*map(np.asarray, inputs))[0], want.detach(), rtol=1e-4)


def test_an_axis_is_called_as_asked() -> None:
    x, y = rows(4, 6)
    shapes: dict[str, Any] = {"x": {0: 2 * Dim("pairs"), 1: "steps"}, "y": {0: 2 * Dim("others") + 2, 1: "steps"}}
    program = graphopt.capture(Apart(), (x, y), dynamic_shapes=shapes)
    assert [spec.shape for spec in program.inputs] == [("2*pairs", "steps", 3), ("2*others+2", "steps", 3)]


def test_axes_of_one_name_are_of_one_size() -> None:
    shapes: dict[str, Any] = {"x": {0: "rows"}, "y": {0: "rows"}}
    program = graphopt.capture(Apart(), rows(4, 4), dynamic_shapes=shapes)
    assert [spec.shape[0] for spec in program.inputs] == ["rows", "rows"]
    shapes = {"x": {1: "steps"}, "y": {1: "steps"}}
    with pytest.raises(CaptureError, match="do not depend on each other as they were declared to"):
        graphopt.capture(Apart(), (rows(4)[0], rows(4)[0][:, :1].repeat(1, 3, 1)), dynamic_shapes=shapes)


def test_an_axis_of_a_name_that_is_none() -> None:
    with pytest.raises(UsageError, match="An axis cannot be called 'a b'"):
        graphopt.capture(Apart(), rows(4, 4), dynamic_shapes={"x": {1: "a b"}})
