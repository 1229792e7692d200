"""Sizes that axes are declared to have stay with the program: from the file, through passes, to the artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import graphopt
from graphopt.errors import DataError, UsageError
from graphopt.ir.sizes import ANY, SizeRange


class Layers(nn.Module):
    """Two layers, and as many rows as are asked for."""

    def __init__(self, rows: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows, self.first, self.second = rows, nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).relu())
        if self.rows == "at most 8":
            return y if x.shape[0] <= 8 else y * 2
        if self.rows == "4 to 9":
            return y + y[3]
        if self.rows == "pairs":
            return y.reshape(-1, 2, 3).flip(1).reshape(-1, 3)
        if self.rows == "at most 2":
            return y + torch.arange(6.0).reshape(2, 3)[: x.shape[0]]
        return y + y[1] if self.rows == "2 or more" else y


CASES: dict[str, tuple[Any, int, tuple[int, ...], SizeRange]] = {
    "at most 8": (Dim("rows", min=2, max=8), 4, (1, 8), SizeRange(0, 8)),
    "4 to 9": (Dim("rows", min=4, max=9), 5, (4, 9), SizeRange(4, 9)),
    "at most 2": (Dim("rows", max=2), 2, (1, 2), SizeRange(0, 2)),
    "pairs": (2 * Dim("rows", min=3, max=5), 8, (6, 10), SizeRange(6, 10)),
    "2 or more": (Dim.DYNAMIC, 4, (2, 9), SizeRange(2)),
}


@pytest.mark.parametrize("rows", CASES)
@pytest.mark.parametrize("way", ["file", "module", "capture"])
def test_sizes_at_both_ends(rows: str, way: str, tmp_path: Path) -> None:
    dim, count, ends, sizes = CASES[rows]
    model = Layers(rows).eval()
    shapes = {"x": {0: dim}}
    if way == "capture":
        program = graphopt.capture(model, torch.randn(count, 4), dynamic_shapes=shapes)
    else:
        exported = torch.export.export(model, (torch.randn(count, 4),), dynamic_shapes=shapes)
        if way == "file":
            torch.export.save(exported, tmp_path / "model.pt2")
            program = graphopt.load(tmp_path / "model.pt2")
        else:
            program = graphopt.capture(exported.module(check_guards=False), torch.randn(count, 4))  # type: ignore[arg-type]
    assert program.inputs[0].range_of(0) == sizes
    assert [note.text for note in program.notes if note.subject == "sizes"] == [
        f"Axis 0 of `x` has a size of {sizes}: the program is of no other."
    ]
    again = graphopt.load(program.save(tmp_path / "again.pt2"))
    assert (again.inputs, again.notes) == (program.inputs, program.notes)
    result = graphopt.optimize(again, passes="fold", bench=False)
    assert result.artifact is not None
    assert result.artifact.inputs == result.program.inputs == program.inputs
    opened = result.artifact.backend.open(result.artifact.path)
    assert [spec.ranges for spec in opened.inputs] == [spec.ranges for spec in program.inputs]
    first = max(sizes.least, 1)
    assert f"np.zeros(({first}, 4), dtype='float32')" in result.artifact.backend.run_script(opened)
    session = opened.session()
    for size in {sizes.least - 1, (sizes.most or 0) + 1} - {-1, 1}:
        said = f"Axis 0 of input `x` has a size of {size}, and the program is of {sizes}"
        with pytest.raises(UsageError, match=said):
            session(np.zeros((size, 4), np.float32))
        with pytest.raises(UsageError, match=said):
            program(torch.zeros(size, 4))
    for size in ends:
        x = torch.randn(size, 4)
        np.testing.assert_allclose(session(x.numpy())[0], model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dim", "least", "most"),
    [
        (Dim("rows", min=3, max=9), 3, 9),
        (Dim("rows", max=2), 0, 2),
        (3 * Dim("rows", min=3, max=5), 9, 15),
        (Dim("rows", min=5), 5, None),
    ],
)
def test_what_is_exported_again_has_the_range_of_what_was_captured(
    dim: Any, least: int, most: int | None, tmp_path: Path
) -> None:
    shapes = {"x": {0: dim}}
    x = torch.randn(2 if most == 2 else 6 if most != 15 else 9, 4)
    torch.export.save(torch.export.export(Layers("").eval(), (x,), dynamic_shapes=shapes), tmp_path / "model.pt2")
    program = graphopt.load(tmp_path / "model.pt2")
    program.save(tmp_path / "again.pt2")
    for exported in (program.export(), torch.export.load(tmp_path / "again.pt2")):
        (value,) = (node.meta["val"] for node in exported.graph.nodes if node.name == "x")
        found = exported.range_constraints[value.shape[0].node.expr]
        assert least in (found.lower, 0)
        assert (int(found.upper) if found.upper.is_Integer else None) == most
        with pytest.raises((RuntimeError, AssertionError)):
            exported.module()(torch.randn(most + 1 if most else least - 1, 4))
        exported.module()(torch.randn(most or least, 4))


def test_an_axis_without_a_name_of_at_most_two() -> None:
    shapes = {"x": {0: Dim.DYNAMIC(max=2), 1: Dim.DYNAMIC(max=2)}}
    program = graphopt.capture(Layers(""), torch.randn(2, 2, 4), dynamic_shapes=shapes)
    assert program.inputs[0].shape == ("batch", "x_1", 4)
    assert program.inputs[0].ranges == (SizeRange(0, 2), SizeRange(0, 2), ANY)


def test_an_example_is_made_as_large_as_the_range_begins() -> None:
    program = graphopt.capture(Layers("4 to 9"), torch.randn(1, 4), dynamic_shapes={"x": {0: Dim("rows", min=4)}})
    assert program.batch_size is None
    assert [len(tensor) for tensor in program.flat_examples()] == [4]


class Added(nn.Module):
    """What is added to each row is a mean of any number of rows, or nothing."""

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None = None) -> Tensor:
        y = x + table.mean(0)
        return y if mask is None else y * mask


def test_a_range_of_an_axis_that_is_no_batch_leaves_the_batch_as_it_is() -> None:
    shapes = {"x": {0: Dim("b", max=8)}, "table": {0: Dim("n", min=50)}}
    program = graphopt.capture(Added(), (torch.randn(1, 3), torch.randn(60, 3)), dynamic_shapes=shapes)
    assert [tuple(tensor.shape) for tensor in program.flat_examples()] == [(2, 3), (60, 3)]
    assert [spec.shape for spec in program.inputs] == [("b", 3), ("n", 3)]


@pytest.mark.parametrize("exported", [False, True])
def test_ranges_are_those_of_inputs_by_position_or_by_name(exported: bool) -> None:
    shapes: dict[str, Any] = {"x": {0: Dim("b", max=8)}, "table": {0: Dim("n", min=5)}}
    x, table, mask = torch.randn(4, 3), torch.randn(5, 3), torch.rand(1, 3)
    model: nn.Module = Added()
    if exported:
        named, axes = {"table": table, "mask": mask}, {**shapes, "mask": None}
        model, shapes = torch.export.export(model, (x,), named, dynamic_shapes=axes).module(), {}
    program = graphopt.capture(model, (x,), {"mask": mask, "table": table}, dynamic_shapes=shapes)
    ranges = {spec.name: spec.range_of(0) for spec in program.inputs}
    assert ranges == {"x": SizeRange(0, 8), "table": SizeRange(5), "mask": ANY}
    for call in (
        lambda: program(x, mask=mask, table=torch.randn(9, 3)),
        lambda: program(table=torch.randn(9, 3), mask=mask, x=x),
    ):
        assert call().shape == (4, 3)
    for place, rows in (("table", 4), ("x", 9)):
        given = {"mask": mask, "table": table, "x": x, place: torch.randn(rows, 3)}
        with pytest.raises(UsageError, match=f"Axis 0 of input `{place}` has a size of {rows}"):
            program(**given)


@pytest.mark.parametrize("way", ["file", "module"])
@pytest.mark.parametrize(("factor", "offset"), [(2, 0), (1, 1)])
def test_an_axis_that_grows_with_another_begins_where_that_does(
    factor: int, offset: int, way: str, tmp_path: Path
) -> None:
    """Where torch's trace of any size does is no bound."""

    class Grown(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x[:1] + y

    rows = Dim("rows")
    shapes = {"x": {0: rows}, "y": {0: factor * rows + offset if offset else factor * rows}}
    inputs = torch.randn(3, 4), torch.randn(3 * factor + offset, 4)
    exported = torch.export.export(Grown(), inputs, dynamic_shapes=shapes)
    one = torch.randn(1, 4), torch.randn(factor + offset, 4)
    if way == "file":
        torch.export.save(exported, tmp_path / "model.pt2")
        program = graphopt.load(tmp_path / "model.pt2")
    else:
        program = graphopt.capture(exported.module(), one)  # type: ignore[arg-type]
    assert ([spec.range_of(0) for spec in program.inputs], program.notes) == ([ANY, ANY], ())
    torch.testing.assert_close(program(*one), Grown()(*one))


class Taps(nn.Module):
    """Rows that only some numbers of them have."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "five taps":
            return torch.conv1d(x.t()[None], torch.ones(1, 3, 5))
        return x[3:] * 2 if self.way == "from the fourth" else x[: x.shape[0] % 3 + 1] * 2


@pytest.mark.parametrize(
    ("way", "sizes", "output"),
    [
        ("five taps", SizeRange(5), (1, 1, "batch-4")),
        ("from the fourth", ANY, ("batch-3", 3)),
        ("some", ANY, ("batch%3+1", 3)),
    ],
)
def test_a_program_begins_where_it_runs_and_loads(
    way: str, sizes: SizeRange, output: tuple[int | str, ...], tmp_path: Path
) -> None:
    program = graphopt.capture(Taps(way), torch.randn(8, 3))
    assert (program.inputs[0].range_of(0), program.outputs[0].shape) == (sizes, output)
    again = graphopt.load(program.save(tmp_path / "a.pt2"))
    assert (again.inputs, again.outputs, again.notes) == (program.inputs, program.outputs, program.notes)
    for rows in (max(sizes.least, 1), 9):
        x = torch.randn(rows, 3)
        torch.testing.assert_close(again(x), Taps(way)(x))


def test_a_range_that_begins_where_no_example_is_made() -> None:
    for axis in (0, 1):
        with pytest.raises(UsageError, match=f"Axis {axis} of input `x` is to have a size of 2097152 or more"):
            graphopt.capture(Layers(""), torch.randn(2, 4), dynamic_shapes={"x": {axis: Dim("rows", min=1 << 21)}})


def test_data_of_sizes_that_an_axis_may_not_have() -> None:
    program = graphopt.capture(Layers(""), torch.randn(2, 5, 4), dynamic_shapes={"x": {1: Dim("steps", max=6)}})
    with pytest.raises(DataError, match="Axis 1 of input `x` has a size of 7, and the program is of at most 6"):
        graphopt.optimize(program, torch.randn(4, 7, 4), "int8", bench=False)
