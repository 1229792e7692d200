"""The signature of a program: what its specs say about how it is called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import graphopt
from graphopt.capturing.capture import capture
from graphopt.ir.signature import Dimension, TensorSpec, batch_size


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([("batch", 3)], None),
        ([("batch",), ("2*batch", "length")], None),
        ([(4, 3)], 4),
        ([(), ("batch", 3)], None),
        ([(), (4, 3)], 4),
        ([("batch", 3), (4, 3)], 4),
        ([(4, 3), ("batch", 3)], 4),
        ([()], 1),
        ([], 1),
    ],
)
def test_one_fixed_first_axis_fixes_the_number_of_samples(
    shapes: list[tuple[Dimension, ...]], expected: int | None
) -> None:
    inputs = [TensorSpec(f"x{index}", shape, torch.float32) for index, shape in enumerate(shapes)]
    assert batch_size(inputs) == expected


class _Matched(nn.Module):
    """Scores of rows against a table of four."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).relu()) @ table.T
        return y


class _Looked(_Matched):
    def forward(self, table: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, table)


def _first_fixed() -> graphopt.Program:
    return capture(
        _Looked(), (torch.ones(4, 8), torch.ones(2, 8)), dynamic_shapes={"table": {0: None}, "x": {0: Dim.AUTO}}
    )


def _second_fixed() -> graphopt.Program:
    return capture(
        _Matched(), (torch.ones(2, 8), torch.ones(4, 8)), dynamic_shapes={"x": {0: Dim.AUTO}, "table": {0: None}}
    )


@pytest.mark.parametrize(
    ("made", "passes"),
    [
        (_first_fixed, "prune:ratio=0.5:round_to=1:criterion=activation:compensate=no,int8"),
        (_first_fixed, "prune:ratio=0.5:round_to=1:criterion=taylor,recover:epochs=1"),
        (_second_fixed, "svd:ratio=0.3"),
        (_second_fixed, "prune:ratio=0.5:round_to=1"),
    ],
)
def test_data_fit_a_program_of_which_one_input_has_a_fixed_size(
    made: Callable[[], graphopt.Program], passes: str
) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = {name: torch.randn(42, 8, generator=generator) for name in ("x", "table")}
    program = made()
    assert program.batch_size == 4
    assert {spec.batched for spec in program.inputs} == {True, False}
    labels = torch.arange(42) % 4
    result = graphopt.optimize(program, rows, passes, None, eval=({**rows, "labels": labels}, "top1"), bench=False)
    assert result.program(x=torch.ones(3, 8), table=torch.ones(4, 8)).shape == (3, 4)
