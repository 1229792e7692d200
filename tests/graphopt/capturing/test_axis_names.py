"""Dynamic axes have one name where they have one size, and names of their own where they have not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import graphopt
from graphopt.backends.onnx_execution.batches import batches
from graphopt.ir.sizes import SizeRange


class Pooled(nn.Module):
    """Two inputs of as many rows as each likes; values of either are computed in turn, as buffers are used again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.node, self.edge = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, nodes: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        first = self.node(nodes).tanh()
        second = self.edge(edges + first.mean(0)).tanh()
        third = self.node(first.cos() * second.amax(0)).tanh()
        return third, self.edge(second.cos() * third.amax(0)).tanh()


@pytest.mark.parametrize(
    ("dims", "names"),
    [
        ((Dim.DYNAMIC, Dim.DYNAMIC), ("batch", "batch_1")),
        ((Dim.DYNAMIC, Dim("batch")), ("batch_1", "batch")),
        ((Dim("n"), Dim.DYNAMIC), ("n", "batch")),
    ],
)
def test_first_axes_that_do_not_depend_on_each_other(dims: tuple[object, object], names: tuple[str, str]) -> None:
    model, examples = Pooled().eval(), (torch.randn(7, 5), torch.randn(7, 5))
    program = graphopt.capture(model, examples, dynamic_shapes={"nodes": {0: dims[0]}, "edges": {0: dims[1]}})
    assert tuple(spec.shape[0] for spec in program.inputs) == names
    assert tuple(spec.shape[0] for spec in program.outputs) == names
    artifact = graphopt.optimize(program, passes="", bench=False).artifact
    assert artifact is not None
    for rows in ((4, 7), (9, 3), (30, 1)):
        inputs = torch.randn(rows[0], 5), torch.randn(rows[1], 5)
        for found, want in zip(artifact.session()(*map(np.asarray, inputs)), model(*inputs), strict=True):
            torch.testing.assert_close(torch.tensor(found), want)


def test_other_axes_that_an_exported_module_was_exported_with() -> None:
    model, example = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.ReLU()).eval(), torch.randn(8, 3, 8)
    shapes = ({0: Dim("rows", max=16), 2: Dim("length", min=4, max=32)},)
    exported = torch.export.export(model, (example,), dynamic_shapes=shapes).module()
    program = graphopt.capture(exported, example)  # type: ignore[arg-type]
    assert program.inputs[0].shape == ("batch", 3, "input_2")
    assert program.inputs[0].range_of(2) == SizeRange(4, 32)
    fixed = graphopt.capture(exported, example, dynamic_shapes={"input": {2: Dim.STATIC}})  # type: ignore[arg-type]
    assert fixed.inputs[0].shape == ("batch", 3, 8)
    assert [note.text[:6] for note in fixed.notes] == ["Axis 0"]


def test_an_exported_axis_that_the_example_fixes_is_noted() -> None:
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    exported = torch.export.export(nn.ReLU().eval(), (torch.randn(8, 3),), dynamic_shapes=shapes)
    program = graphopt.capture(exported.module(), torch.randn(8, 1))  # type: ignore[arg-type]
    assert program.inputs[0].shape == ("batch", 1)
    assert [note.text for note in program.notes] == [
        "Axis 1 of `input` was exported as dynamic and is fixed: its example has a size of 1."
    ]


class Scatters(nn.Module):
    """A kernel of ONNX Runtime takes as many rows of both; torch's takes more sources than indices."""

    def forward(self, index: Tensor, source: Tensor) -> Tensor:
        return torch.zeros(3, 4).scatter_add(0, index, source)


def test_first_axes_that_a_kernel_alone_ties_are_verified_at_one_size() -> None:
    data = torch.randint(0, 3, (6, 4)), torch.randn(6, 4)
    program = graphopt.optimize(Scatters(), data, "", bench=False).program
    assert [spec.shape for spec in program.inputs] == [("batch", 4), ("batch_1", 4)]
    sizes = [tuple(len(array) for array in arrays) for _, arrays in batches(program, [*map(np.asarray, data)])]
    assert sizes == [(1, 1), (3, 3), (8, 8)]
