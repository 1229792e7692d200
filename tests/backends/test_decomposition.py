"""Decomposing call by call: the same numbers, the same table respected, a whole trace where it takes one."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from graphopt import Program, capture
from graphopt.backends.onnx_lowering.decomposition import Decomposed
from graphopt.backends.onnxruntime import OnnxRuntimeBackend
from graphopt.ir.exporting import exported


class Pooled(nn.Module):
    """Two calls that torch takes apart, the last of them the result; an input called like a Python builtin."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), norm

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.conv(input))
        return nn.functional.adaptive_avg_pool2d(y, 1).flatten(1), y.flatten(2)


class Quantiles(nn.Module):
    """A decomposition with several results."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, (1, 2))
        return variance + mean


class Branching(nn.Module):
    """A region, which only a whole trace can decompose."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.cond(x.sum() > 0, lambda v: (v * 2).flatten(1), lambda v: -v.flatten(1), (x,))
        return y


def program_of(model: nn.Module) -> Program:
    torch.manual_seed(0)
    return capture(model.eval(), (torch.randn(2, 3, 6, 6),))


TABLE = torch.export.default_decompositions()
FEW = {target: TABLE[target] for target in (torch.ops.aten.adaptive_avg_pool2d.default, torch.ops.aten.var_mean.dim)}


@pytest.mark.parametrize("model", [Pooled(nn.Identity()), Quantiles()], ids=["pooled", "several results"])
def test_few_calls_are_decomposed_in_place(model: nn.Module) -> None:
    program = program_of(model)
    shared = exported(program).program
    before = str(shared.graph)
    own = Decomposed.on_demand(shared)
    assert own.run_decompositions(FEW) is own
    gone = {*FEW, torch.ops.aten.flatten.using_ints}
    assert not gone & {node.target for node in own.graph.nodes}
    assert torch.ops.aten.conv2d.default in {node.target for node in own.graph.nodes} or isinstance(model, Quantiles)
    assert all("val" in node.meta for node in own.graph.nodes if node.op == "call_function")
    assert str(shared.graph) == before
    for batch in (1, 5):
        x = torch.randn(batch, 3, 6, 6)
        torch.testing.assert_close(own.module(check_guards=False)(x), program(x))


@pytest.mark.parametrize("model", [Pooled(nn.BatchNorm2d(4)), Branching()], ids=["norm", "region"])
def test_what_takes_a_whole_trace_gets_one(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.backends.onnx_lowering.decomposition._FEW", 2)
    program = program_of(model)
    own = Decomposed.on_demand(exported(program).program)
    decomposed = own.run_decompositions(FEW)
    assert decomposed is not own
    x = torch.randn(5, 3, 6, 6)
    torch.testing.assert_close(decomposed.module(check_guards=False)(x), program(x))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("rank", "mode", "align"),
    [(1, "nearest", None), (2, "nearest", None), (3, "nearest", None), (2, "bilinear", True), (3, "trilinear", False)],
)
def test_an_image_is_resized_by_one_operator(
    rank: int, mode: str, align: bool | None, dynamic: bool, tmp_path: Path
) -> None:
    """Taken apart it reads every element by an index of its own, from tables as large as the image."""

    class Resized(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.interpolate(x, scale_factor=1.5, mode=mode, align_corners=align)

    axes = {"x": {axis + 2: torch.export.Dim.DYNAMIC for axis in range(rank)}} if dynamic else None
    program = capture(Resized(), torch.randn(2, 3, *[7, 5, 4][:rank]), dynamic_shapes=axes)
    backend = OnnxRuntimeBackend()
    artifact = backend.lower(program, tmp_path / "model.onnx")
    assert [node.op_type for node in ir.load(artifact.path).graph] == ["Resize"]
    assert backend.verify(artifact, program) < 1e-6
