"""What is written for one size elsewhere holds at any size of a dynamic axis, or is refused by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from graphopt import Program, capture
from graphopt.backends.onnx_lowering import exporter
from graphopt.backends.onnx_lowering.lowering import Style, lower
from graphopt.backends.onnxruntime import OnnxRuntimeBackend
from graphopt.errors import LoweringError

F = nn.functional


class Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)


def doubled(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Values of the same recorded size and of different ones, some of them results."""
    return (*parts, *((part * 2).relu() for part in parts))


PLANES = Dim.DYNAMIC(min=3, max=20)
CALLS: dict[str, Callable[[Tensor], object]] = {
    "means": lambda x: (F.adaptive_avg_pool2d(x, (4, 1)), F.adaptive_avg_pool2d(x, (3, None))),
    "areas": lambda x: F.interpolate(x, 5, mode="area"),
    "largest": lambda x: (F.adaptive_max_pool2d(x, (4, 5)), F.adaptive_max_pool1d(x.flatten(2), 3)),
    "of three axes": lambda x: F.adaptive_avg_pool3d(x, (2, 3, 2)),
    "to a size that varies": lambda x: F.adaptive_avg_pool2d(x, (x.shape[3], 4)),
    "tensor_split": lambda x: doubled(x.tensor_split(3, 2)),
    "chunk": lambda x: doubled(x.chunk(2, 2)),
    "grid": lambda x: x + torch.meshgrid(torch.arange(x.shape[2]), torch.arange(x.shape[3]), indexing="ij")[0],
    "split": lambda x: (x.split((1, x.shape[3] - 1), 3)[1].exp(), torch.unsafe_chunk(x, 2, 3)[0] * 2),
}


def program_of(function: Callable[[Tensor], object]) -> Program:
    torch.manual_seed(0)
    model = Applied(function)
    return capture(model, (torch.randn(2, 3, 8, 12),), None, {"x": {2: PLANES, 3: Dim.DYNAMIC(min=3, max=20)}})


@pytest.mark.parametrize("name", CALLS)
def test_at_every_size_an_artifact_computes_what_the_program_does(name: str, tmp_path: Path) -> None:
    program = program_of(CALLS[name])
    backend = OnnxRuntimeBackend()
    artifact = backend.lower(program, tmp_path / "model.onnx")
    assert backend.verify(artifact, program) < 1e-5
    session = backend.session(artifact)
    for height, width in ((8, 12), (7, 20), (20, 3), (5, 5)):
        x = torch.randn(3, 3, height, width)
        for wanted, found in zip(program.call_flat((x,)), session(x.numpy()), strict=True):
            torch.testing.assert_close(torch.from_numpy(found), wanted)


def test_places_of_the_largest_are_refused() -> None:
    program = program_of(lambda x: F.adaptive_max_pool2d(x, 4, return_indices=True))
    with pytest.raises(LoweringError, match=r"pooling at .*test_any_size.py:\d+ returns where .* return_indices"):
        lower(program, Style(20))


@pytest.mark.parametrize("few", [True, False])
def test_what_torch_takes_apart_for_one_size_is_refused(few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "hold_at_any_size", lambda gm: None)
    monkeypatch.setattr("graphopt.backends.onnx_lowering.decomposition._FEW", 16 if few else 0)
    program = program_of(lambda x: F.adaptive_avg_pool2d(x, 4))
    name = r"The operator adaptive_avg_pool2d at .*test_any_size.py:\d+" if few else "An operator"
    for _ in range(2):  # torch decides once
        with pytest.raises(LoweringError, match=rf"^{name} would be lowered for the sizes of the example alone"):
            lower(program, Style(20))


def test_nothing_foreign_leaves_a_lowering(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of(lambda x: x.chunk(2, 2)[0])
    monkeypatch.setattr(exporter, "hold_at_any_size", lambda gm: None)
    with pytest.raises(
        LoweringError, match=r"torch\.onnx cannot translate the program at .*test_any_size\.py:\d+: .*'ndim'"
    ):
        lower(program, Style(20))
    monkeypatch.setattr(exporter, "hold_at_any_size", failing_at_the_first_call)
    with pytest.raises(LoweringError, match=r"cannot be lowered at .*test_any_size.py:\d+: KeyError: 'odd'\. Please"):
        lower(program, Style(20))


def failing_at_the_first_call(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        if node.op == "call_function":
            raise KeyError("odd")
