"""int8 calibrated with data, and on weights, that nobody means to give: one sample, constants, numbers too small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphopt.backends.onnxruntime import OnnxRuntimeBackend
from graphopt.capturing.capture import capture
from graphopt.ir.program import Program
from graphopt.measure.equivalence import measure
from graphopt.passes.int8 import Int8Options
from tests.passes.int8_models import images, kernels, quantized, seeded

_NORMAL = float(np.finfo(np.float32).tiny)
OBSERVERS = ("minmax", "average", "percentile", "mse", "entropy")


@pytest.fixture(scope="module")
def program() -> Program:
    """A channel of the first convolution is zero, one below the smallest normal number."""
    model = seeded(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 1)))
    model[0].weight.data[1] = 0
    model[0].weight.data[2] = 1e-39
    return capture(model, (images(count=2),))


DATA = {
    "one sample": images(count=1),
    "a constant": torch.full((6, 3, 8, 8), 0.5),
    "zeros": torch.zeros(6, 3, 8, 8),
    "denormals": torch.full((6, 3, 8, 8), 1e-40),
    "one value that is not zero": torch.zeros(6, 3, 8, 8).index_put((torch.tensor(0),) * 4, torch.tensor(3.0)),
}


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("data", DATA.values(), ids=list(DATA))
def test_numbers_are_right(program: Program, data: Tensor, observer: str) -> None:
    result, plan = quantized(program, data, options=Int8Options(observer=observer))  # type: ignore[arg-type]
    scales = [float(tensor.min()) for name, tensor in plan.tensors.items() if name.endswith("_scale")]
    scales += [record["scale"] for record in plan.values]
    assert min(scales) >= _NORMAL
    assert bool(torch.isfinite(result(images())).all())
    clipped = observer == "percentile" and data is DATA["one value that is not zero"]
    if not clipped:  # which is what a percentile is for
        assert measure(program, result.call_flat, (data,)).sqnr > 20


@pytest.mark.parametrize("small", [1e-5, 1e-7, 1e-12, 1e-30])
@pytest.mark.parametrize("at", [0, 2, 3])
def test_channels_that_are_nearly_dead_and_have_a_bias(small: float, at: int, tmp_path: Path) -> None:
    layers = nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)
    model = seeded(nn.Sequential(*layers))
    with torch.no_grad():
        model[at].weight[1] *= small
        model[at].bias[1] = 0.5
    program, data = capture(model, (images(count=2),)), images()
    result, _ = quantized(program, data)
    assert measure(program, result.call_flat, (data,)).sqnr > 25
    kernels(result, tmp_path, data)


@pytest.mark.parametrize("accuracy", ["fast", "balanced", "best"])
def test_every_accuracy_takes_one_sample(program: Program, accuracy: str) -> None:
    data = DATA["one sample"]
    result, _ = quantized(program, data, options=Int8Options(accuracy=accuracy))  # type: ignore[arg-type]
    assert measure(program, result.call_flat, (data,)).sqnr > 20


@pytest.mark.parametrize("dead", [1, 16])
def test_channels_without_weights_keep_their_bias(dead: int, tmp_path: Path) -> None:
    """ONNX Runtime rounds a float bias by the scale of its channel, which was 1 where there were no weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1))
    with torch.no_grad():
        model[2].weight[:dead] = 0
        model[2].bias[:dead] = torch.rand(dead)
    program, _ = quantized(model, x := images(size=12, count=8))
    backend = OnnxRuntimeBackend()
    assert backend.verify(backend.lower(program, tmp_path / "it.onnx"), program, (x.numpy(),)) < 1e-2
