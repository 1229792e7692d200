"""Small networks that show one placement each, with the kernels ONNX Runtime should run, and how tests quantize."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from graphopt.backends.onnx_execution.session import SessionSettings
from graphopt.backends.onnxruntime import OnnxRuntimeBackend
from graphopt.backends.onnxruntime.description import DESCRIPTION
from graphopt.backends.onnxruntime.fusion import kernel_counts
from graphopt.capturing.capture import capture
from graphopt.ir.operators import short_name
from graphopt.ir.program import Program
from graphopt.passes.fold import Fold
from graphopt.passes.int8 import Int8, Int8Options
from graphopt.passes.quantization.plan import Int8Plan
from graphopt.pipeline.context import Context
from graphopt.targets.description import TargetDescription
from graphopt.testing import TensorSamples
from tests.models import OptionA, Residual

WITHOUT_COSTS = dataclasses.replace(DESCRIPTION, costs=None)  # by which networks so small stay float


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(channels: int = 3, size: int = 8, count: int = 16) -> Tensor:
    return noise(count, channels, size, size, seed=1)


def seeded(model: nn.Module) -> nn.Module:
    """Give a model weights of its own that do not depend on what ran before."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        fan = max(parameter[0].numel(), 1) if parameter.dim() > 1 else 4
        parameter.data.normal_(generator=generator).div_(fan**0.5)
    return model.eval()


def folded(model: nn.Module, *inputs: Tensor) -> Program:
    program = capture(seeded(model), inputs)
    plan = Fold().plan(program, Context(original=program))
    return Fold().apply(program, plan) if plan.sites else program


def quantized(
    model: nn.Module | Program,
    *data: Tensor,
    target: TargetDescription = WITHOUT_COSTS,
    options: Int8Options | None = None,
) -> tuple[Program, Int8Plan]:
    program = model if isinstance(model, Program) else folded(model, *data)
    instance = Int8(options)
    context = Context(original=program, targets=(target,), target=target, samples=TensorSamples(data))
    plan = instance.plan(program, context)
    return (instance.apply(program, plan) if plan.sites else program), plan


def kernels(program: Program, path: Path, *data: Tensor) -> Counter[str]:
    """Lower, let ONNX Runtime optimise, compare with the program, and count the kernels that run."""
    backend = OnnxRuntimeBackend()
    artifact = backend.lower(program, path / "model.onnx")
    backend.verify(artifact, program, tuple(tensor.numpy() for tensor in data))
    assert [finding.text for finding in backend.check(artifact)] == []
    return Counter(kernel_counts(artifact.path, SessionSettings.of(artifact.session_options)))


def operators(program: Program) -> Counter[str]:
    return Counter(short_name(node) for node in program.graph.nodes if node.op == "call_function")


def reasons(plan: Int8Plan) -> dict[str, str]:
    return {refusal.site: refusal.reason for refusal in plan.refusals}


class TwoConvs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.b(x) + x


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).mean((2, 3)))


class TwoReaders(nn.Module):
    """A value that is an output, feeds a convolution and a float operator."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.a(x).relu()
        return y, self.b(y), torch.tanh(y)


class SharedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x).relu())


class ConstantOperand(nn.Module):
    """Adds and multiplies by stored numbers of several shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.offset, self.gain = nn.Parameter(torch.ones(1, 1, 8, 8)), nn.Parameter(torch.ones(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.conv(x).relu() + self.offset) * self.gain)


class Gate(nn.Module):
    """Squeeze and excite: a broadcast product of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.squeeze, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv(x))
        return self.out(x * self.squeeze(F.adaptive_avg_pool2d(x, 1)).sigmoid())


class Mobile(nn.Module):
    """MobileNetV3's block around a skip: expanded to `width`, depthwise, gated, projected."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem, self.expand = nn.Conv2d(3, 8, 1), nn.Conv2d(8, width, 1)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.squeeze, self.excite, self.project = nn.Conv2d(width, 8, 1), nn.Conv2d(8, width, 1), nn.Conv2d(width, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.hardswish(self.depthwise(self.expand(x).relu()))
        gate = F.hardsigmoid(self.excite(self.squeeze(F.adaptive_avg_pool2d(y, 1)).relu()))
        return x + self.project(y * gate)


class HardActivations(nn.Module):
    """What the runtime has no integer kernel for, in others that have one; a ReLU of what is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(n, 8, 1) for n in (3, 8, 8, 8))
        self.squeeze, self.out, self.slopes, self.slope = (
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(8, 4, 1),
            nn.PReLU(8),
            nn.PReLU(),
        )
        self.register_buffer("steep", torch.linspace(-0.5, 2.0, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.a(x))
        x = x * F.hardsigmoid(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
        x = self.slopes(self.b(x))
        x = self.slope(F.prelu(self.c(x), self.steep))
        return self.out(x + self.d(x.relu()))


class PreActivation(nn.Module):
    """DenseNet's layers: norms, which nothing in front of them takes in, of integers and of floats."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 4, 1)
        self.first, self.second, self.third = nn.BatchNorm2d(3), nn.BatchNorm2d(4), nn.BatchNorm2d(8, affine=False)
        for norm in (self.first, self.second, self.third):
            norm.running_mean.normal_(generator=torch.Generator().manual_seed(1))
            norm.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.first(torch.tanh(x)).relu()).relu()
        x = torch.cat([x, self.b(self.second(x).relu())], 1)
        return self.c(self.third(x).relu())


class Shuffle(nn.Module):
    """Grouped and depthwise convolutions, a channel shuffle, chunk and concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 8, 1, groups=2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.c, self.d = nn.Conv2d(4, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu())
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        left, right = x.chunk(2, dim=1)
        return self.d(torch.cat([left, self.c(right).relu()], 1))


class Pools(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu6(self.a(x)), 2)
        return self.b(F.avg_pool2d(F.interpolate(x, scale_factor=2), 2))


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


class Tokens(nn.Module):
    """A transformer's feed-forward block on embedded ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Signal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 4, 3), nn.Conv1d(4, 4, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


IDS = torch.randint(0, 11, (16, 6), generator=torch.Generator().manual_seed(0))
EDGES: list[tuple[type[nn.Module], Tensor, dict[str, int]]] = [
    (TwoConvs, images(), {"QLinearConv": 2, "QLinearAdd": 1}),
    (Head, images(), {"QLinearConv": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1}),
    (TwoReaders, images(), {"QLinearConv": 2}),
    (SharedWeight, images(4), {"QLinearConv": 2}),
    (ConstantOperand, images(), {"QLinearConv": 2, "QLinearAdd": 1, "QLinearMul": 0}),
    (Gate, images(), {"QLinearConv": 3, "QLinearMul": 2, "QLinearSigmoid": 2, "QLinearGlobalAveragePool": 1}),
    (
        HardActivations,
        images(),
        {"QLinearConv": 9, "QLinearLeakyRelu": 1, "QLinearMul": 2, "QLinearAdd": 6, "QuantizeLinear": 1},
    ),
    (
        PreActivation,
        images(),
        {"QLinearConv": 5, "QLinearConcat": 1, "BatchNormalization": 1, "DequantizeLinear": 1, "QuantizeLinear": 1},
    ),
    (Shuffle, images(4), {"QLinearConv": 4, "QLinearConcat": 1, "DequantizeLinear": 1}),
    (Pools, images(), {"QLinearConv": 2, "QLinearAveragePool": 1, "MaxPool": 0}),
    (Perceptron, noise(16, 8), {"QGemm": 2, "Relu": 0}),
    (Tokens, IDS, {"MatMulIntegerToFloat": 2, "MatMul": 0}),
    (Signal, noise(16, 3, 16), {"QLinearConv": 2}),
    (OptionA, images(), {"QLinearConv": 2, "QLinearAdd": 1, "QGemm": 1, "Pad": 1, "QuantizeLinear": 1}),
    (Residual, images(), {"QLinearConv": 3, "QLinearAdd": 1}),
]


@functools.cache
def edge(kind: type[nn.Module]) -> Program:
    """Capture and fold one of them, for every test that starts there."""
    return folded(kind(), next(data for model, data, _ in EDGES if model is kind))
