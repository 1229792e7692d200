"""What operators of an artifact take, as the runtime tells."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from graphopt.backends.onnxruntime.backend import OnnxRuntimeBackend
from graphopt.capturing.capture import capture
from tests.passes.int8_models import images, quantized


class Both(nn.Module):
    """A convolution that becomes integer, and a softmax that stays float."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.conv(x), 1)


def test_operators_are_told_with_what_they_compute_on(tmp_path: Path) -> None:
    x = images(size=24, count=4)
    backend = OnnxRuntimeBackend()
    artifact = backend.lower(quantized(Both(), x)[0], tmp_path / "it.onnx")
    times = backend.operator_times(artifact, (x.numpy(),))
    of = {time.operator: time.values for time in times}
    assert (of["QLinearConv"], of["Softmax"], of["QuantizeLinear"]) == ("integer", "float", "turned")
    assert all(0 < time.seconds < 1 for time in times)
    assert not [file for file in tmp_path.iterdir() if file.suffix == ".json"]


class Branching(nn.Module):
    """Computes in a branch."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: torch.tanh(x), lambda x: x * 2, (x,))  # type: ignore[no-any-return]


def test_what_a_branch_takes_counts_once(tmp_path: Path) -> None:
    x, backend = torch.ones(4, 64), OnnxRuntimeBackend()
    artifact = backend.lower(capture(Branching().eval(), (x,)), tmp_path / "it.onnx")
    operators = [time.operator for time in backend.operator_times(artifact, (x.numpy(),))]
    assert "Tanh" in operators
    assert "If" not in operators
