"""int8 on random small networks: program and runtime compute the same integers."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.backends.onnxruntime import OnnxRuntimeBackend
from tests.passes.int8_models import images, quantized


@st.composite
def networks(draw: st.DrawFn) -> Random:
    """Random small CNNs: chains with branches, joined by add, mul or concatenation."""
    steps = draw(st.lists(st.tuples(st.sampled_from(sorted(Random.STEPS)), st.integers(0, 3)), min_size=3, max_size=7))
    return Random(steps)


class Random(nn.Module):
    WIDTH = 4
    STEPS = ("conv", "conv_relu", "depthwise", "relu6", "add", "mul", "cat", "max_pool", "avg_pool", "sigmoid", "pad")

    def __init__(self, steps: list[tuple[str, int]]) -> None:
        super().__init__()
        self.steps = steps
        self.stem, self.head = nn.Conv2d(3, self.WIDTH, 1), nn.Linear(self.WIDTH, 3)
        self.layers = nn.ModuleList()
        for name, _ in steps:
            groups = self.WIDTH if name == "depthwise" else 1
            inputs = 2 * self.WIDTH if name == "cat" else self.WIDTH
            self.layers.append(nn.Conv2d(inputs, self.WIDTH, 3, padding=1, groups=groups))

    def forward(self, x: Tensor) -> Tensor:
        seen = [self.stem(x)]
        for (name, back), layer in zip(self.steps, self.layers, strict=True):
            seen.append(self.step(name, layer, seen[-1], seen[max(len(seen) - 1 - back, 0)]))
        return self.head(seen[-1].mean((2, 3)))

    def step(self, name: str, layer: nn.Module, x: Tensor, other: Tensor) -> Tensor:
        match name:
            case "conv" | "depthwise":
                return layer(x)
            case "conv_relu":
                return layer(x).relu()
            case "relu6":
                return F.relu6(x)
            case "add":
                return layer(x) + other
            case "mul":
                return x * layer(other).sigmoid()
            case "cat":
                return layer(torch.cat([x, other], 1))
            case "max_pool":
                return F.max_pool2d(x, 3, stride=1, padding=1)
            case "avg_pool":
                return F.avg_pool2d(x, 3, stride=1, padding=1)
            case "sigmoid":
                return x.sigmoid()
        return F.pad(x[:, :2], (0, 0, 0, 0, 1, 1))


def test_program_and_runtime_agree() -> None:
    """Every integer ONNX Runtime computes is within one step of the program's (`verify`), and outputs mean the same."""
    drawn: set[str] = set()

    @settings(max_examples=6, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    @given(networks())
    def check(model: Random) -> None:
        drawn.update(name for name, _ in model.steps)
        data = images(3, 6, 8)
        program, plan = quantized(model, data)
        assert "conv2d" in plan.sites
        with tempfile.TemporaryDirectory() as folder:
            backend = OnnxRuntimeBackend()
            artifact = backend.lower(program, Path(folder) / "model.onnx")
            backend.verify(artifact, program, (data.numpy(),))

    check()
    assert drawn == set(Random.STEPS)
