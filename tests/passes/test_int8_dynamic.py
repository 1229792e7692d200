"""int8 whose kernels choose the scales of activations themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from graphopt.backends.onnxruntime import OnnxRuntimeBackend
from graphopt.backends.tensorrt.description import DESCRIPTION as TENSORRT
from graphopt.capturing.capture import capture
from graphopt.errors import DataError
from graphopt.ir.program import Program
from graphopt.measure.equivalence import measure
from graphopt.passes.int8 import Int8, Int8Options
from graphopt.passes.quantization import choice
from graphopt.passes.quantization.plan import Int8Plan
from graphopt.pipeline.context import Context
from graphopt.statistics import calibration
from graphopt.targets.description import TargetDescription
from graphopt.testing import TensorSamples, check_pass
from tests.passes.int8_models import WITHOUT_COSTS, folded, kernels, noise, reasons


class Head(nn.Module):
    """A convolution, then two layers that read the same value, and one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 16, 1)
        self.query, self.key = nn.Linear(16, 24), nn.Linear(16, 24, bias=False)
        self.out = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).transpose(1, 2).relu()
        return self.out(self.query(x) * self.key(x))


@pytest.fixture(scope="module")
def head() -> Program:
    return folded(Head(), noise(16, 8, 5))


def planned(
    program: Program, data: Tensor | None, mode: str = "auto", target: TargetDescription = WITHOUT_COSTS
) -> tuple[Program, Int8Plan]:
    instance = Int8(Int8Options(mode=mode))  # type: ignore[arg-type]
    samples = None if data is None else TensorSamples((data,))
    plan = instance.plan(program, Context(original=program, target=target, samples=samples))
    return instance.apply(program, plan), plan


def by_layer(plan: Int8Plan) -> dict[str, str]:
    return {layer["weight"].removesuffix("_int8_t").removesuffix("_int8"): layer["scales"] for layer in plan.layers}


def test_needs_no_data_and_reaches_the_kernels(head: Program, tmp_path: Path) -> None:
    program, plan = planned(head, None, "dynamic")
    assert by_layer(plan) == dict.fromkeys(("query.weight", "key.weight", "out.weight"), "dynamic")
    assert reasons(plan) == {"conv1d": "no kernel of onnxruntime takes it with dynamic scales"}
    x = noise(16, 8, 5)
    assert measure(head, program.call_flat, (x,)).sqnr > 30
    backend = OnnxRuntimeBackend()
    artifact = backend.lower(program, tmp_path / "a.onnx")
    assert backend.verify(artifact, program) < 0.05
    assert artifact.facts == artifact.facts | {"quantized": 3, "integer": 3}
    found = kernels(program, tmp_path, x)
    assert (found["DynamicQuantizeLinear"], found["MatMulIntegerToFloat"], found["DynamicQuantizeMatMul"]) == (1, 2, 1)


def test_keeps_the_contract_of_passes(head: Program) -> None:
    check_pass(Int8(Int8Options(mode="dynamic")), head, (noise(4, 8, 5),), target=WITHOUT_COSTS)


def test_matrices_with_a_bias(tmp_path: Path) -> None:
    program = folded(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)), noise(16, 16))
    made, _ = planned(program, None, "dynamic")
    backend = OnnxRuntimeBackend()
    artifact = backend.lower(made, tmp_path / "a.onnx")
    backend.verify(artifact, made)
    assert "MatMulAddFusion" not in artifact.session_options["disabled_optimizers"]
    assert artifact.facts == artifact.facts | {"quantized": 2, "integer": 2}


def test_static_scales_need_data(head: Program) -> None:
    for mode in ("auto", "static"):
        with pytest.raises(DataError, match="needs data"):
            planned(head, None, mode)


def test_targets_without_such_kernels(head: Program) -> None:
    _, plan = planned(head, None, "dynamic", TENSORRT)
    assert plan.layers == ()
    assert set(reasons(plan).values()) == {"no kernel of tensorrt takes it with dynamic scales"}


@pytest.mark.parametrize(("order", "scales"), [(range(32), "dynamic"), ([*range(0, 32, 8)] * 8, "static")])
def test_chooses_by_what_scales_leave_of_small_samples(order: Sequence[int], scales: str) -> None:
    """Scales that a kernel chooses help where a batch holds samples of one magnitude, and not where it holds all."""
    x = noise(32, 8, seed=3) * torch.tensor([1e-3, 1e-1, 1e1, 1e3]).repeat_interleave(8).unsqueeze(1)
    program = folded(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), x)
    _, plan = planned(program, x[list(order)])
    assert by_layer(plan) == {"0.weight": scales, "2.weight": scales}


@pytest.mark.parametrize(("weights", "stored"), [("channel", ["weight_int8"]), ("tensor", [])])
def test_chooses_by_the_scales_that_are_stored(weights: str, stored: list[str]) -> None:
    """One large weight, of an input that is always 0, leaves nothing of the others where all have one scale."""
    layer = nn.Linear(8, 16)
    x = noise(32, 8)
    x[:, 0] = 0
    program = folded(layer, x)
    next(program.parameters()).data[0, 0] = 1000
    instance = Int8(Int8Options(weights=weights))  # type: ignore[arg-type]
    plan = instance.plan(program, Context(original=program, target=WITHOUT_COSTS, samples=TensorSamples((x,))))
    assert [layer["weight"] for layer in plan.layers] == stored
    assert all("8 bits leave its result" in reason for reason in reasons(plan).values())


@pytest.mark.parametrize("way", ["compare_on", "compare"])
def test_nothing_is_run_that_decides_nothing(head: Program, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """One run over the samples for all that is asked of them, dynamic scales only where static ones leave too little.

    Only where it would be much that calibration keeps is the program run again.
    """
    mocks = {name: mock.Mock(wraps=getattr(choice, name)) for name in ("compare_on", "compare")}
    observed = mock.Mock(wraps=calibration.observe)
    monkeypatch.setattr(calibration, "observe", observed)
    monkeypatch.setattr(choice, "_MOST_KEPT", 32 * 5 * (16 + 24) - (way == "compare"))
    for name, found in mocks.items():
        monkeypatch.setattr(choice, name, found)
    _, plan = planned(head, noise(16, 8, 5))
    assert set(by_layer(plan).values()) == {"static"}
    assert observed.call_count == 1
    asked = [set(names) for (_, _, layers), _ in mocks.pop(way).call_args_list for names in layers.values()]
    assert asked == [{"static"}] * 3
    assert not any(other.called for other in mocks.values())


@pytest.mark.parametrize(("samples", "dim"), [(512, Dim.AUTO), (8, Dim.AUTO), (512, Dim("batch", min=6, max=7))])
def test_how_layers_are_compared_decides_nothing(monkeypatch: pytest.MonkeyPatch, samples: int, dim: object) -> None:
    """Samples of unlike magnitude, more than are compared, and than are compared at once."""
    x = noise(48, 8, 5) * torch.logspace(-3, 3, 48)[:, None, None]
    program = capture(Head(), (x[:6],), dynamic_shapes={"x": {0: dim}})
    instance = Int8(Int8Options(samples=samples))
    context = Context(original=program, target=WITHOUT_COSTS, samples=TensorSamples((x,)))
    kept = mock.Mock(wraps=choice.compare_on)
    monkeypatch.setattr(choice, "compare_on", kept)
    first = instance.plan(program, context)
    assert kept.called
    monkeypatch.setattr(choice, "_MOST_KEPT", 0)
    second = instance.plan(program, context)
    assert first.to_json() == second.to_json()
    assert ("dynamic" in by_layer(first).values()) == (samples > 8)
