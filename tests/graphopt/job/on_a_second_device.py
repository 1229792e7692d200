"""A model on another device than the CPU: what is decided, computed and returned there, and what runs on the CPU.

Run by `test_devices`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.distillation.loop import Trainer
from graphopt.errors import CaptureError, PassError, UsageError
from graphopt.ir import devices
from graphopt.ir.devices import device_called
from graphopt.job.replaying import replay
from graphopt.job.result import Result
from tests.graphopt.toy_passes import Scale
from tests.second_device import second_device
from tools.check_device import compare

X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(32) % 5
CPU = torch.device("cpu")


class Net(nn.Module):
    """Convolutions, and a sum with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)
        self.register_buffer("shift", torch.arange(4.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(x).relu()) + self.shift
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    with second_device() as found:
        yield found


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def optimized(model: nn.Module, **more: Any) -> Result:
    passes = "prune:ratio=0.4:round_to=1,int8"
    return graphopt.optimize(model, X, passes, eval=((X,), LABELS), bench=False, **more)


@pytest.fixture(scope="module")
def on_cpu(net: nn.Module) -> Result:
    return optimized(net)


def content(result: Result) -> bytes:
    return result.artifact.path.read_bytes()


def test_passes_decide_there_as_on_the_cpu(device: torch.device) -> None:
    (found,) = compare(device, "residual, sparse")
    assert found.decisions == found.same > 0
    assert found.errors[0] == found.errors[1]
    assert found.wrong == ""


def test_training_there_comes_to_the_same(
    device: torch.device, net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_on = []
    step = Trainer._step

    def watched(trainer: Trainer, steps: Any, batch: Any, at: int, total: int) -> None:
        trained_on.append((batch[0].device, {parameter.device for parameter in steps.parameters}))
        step(trainer, steps, batch, at, total)

    monkeypatch.setattr(Trainer, "_step", watched)
    passes = "prune:ratio=0.4:round_to=1,recover:epochs=1:samples=32:augment=none"
    here, there = (
        graphopt.optimize(model, X, passes, None, bench=False) for model in (net, copy.deepcopy(net).to(device))
    )
    assert {place for place, _ in trained_on} == {CPU, device}
    assert all(places == {place} for place, places in trained_on)
    losses = [[plan["before"], plan["after"]] for plan in (here.plans[-1].measured, there.plans[-1].measured)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    torch.testing.assert_close(there.program(X.to(device)).to("cpu"), here.program(X), rtol=1e-4, atol=1e-4)


def test_a_model_and_its_programs_stay_where_it_is(
    device: torch.device, net: nn.Module, on_cpu: Result, tmp_path: Path
) -> None:
    there = copy.deepcopy(net).to(device)
    result = optimized(there)
    assert {p.device for p in there.parameters()} == {device}
    assert result.original is not None
    assert {result.program.device, result.original.device} == {device}
    assert result.program(X.to(device)).device == device
    assert content(result) == content(on_cpu)
    assert all(tensor.device == CPU for plan in result.plans for tensor in plan.tensors.values())
    assert [row.metric for row in result.report.rows] == [row.metric for row in on_cpu.report.rows]
    result.save(tmp_path / "saved")
    opened = graphopt.open(tmp_path / "saved")
    assert opened.program.device == CPU
    assert opened.fingerprint == on_cpu.fingerprint
    for program in (graphopt.capture(net, X[:2]), graphopt.capture(there, X[:2])):
        (again,) = replay(program, tmp_path / "saved" / "manifest.json").values()
        torch.testing.assert_close(again(X.to(program.device)).to("cpu"), on_cpu.program(X), rtol=0, atol=0)


def test_a_device_is_for_the_passes_alone(device: torch.device, net: nn.Module, on_cpu: Result) -> None:
    seen = []

    class Watch(graphopt.Hook):
        def before(self, step: Any, program: graphopt.Program, target: str) -> None:
            seen.append(program.device)

    result = optimized(net, device=str(device), hooks=[Watch()])
    assert set(seen) == {device}
    assert result.program.device == CPU
    assert content(result) == content(on_cpu)
    assert {p.device for p in net.parameters()} == {CPU}


def test_data_without_a_batch_axis_and_a_program_without_tensors(device: torch.device) -> None:
    program = graphopt.capture(nn.Softmax(1).to(device), torch.randn(2, 3, device=device))
    assert program.device == CPU  # nothing of it lies anywhere else
    result = graphopt.optimize(program.to(device), torch.randn(20, 3), passes="fold", bench=False)
    assert result.program.device == device


def test_names_of_devices(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_called("cpu") == CPU
    assert device_called("auto") == device_called(device.type) == device
    for name, said in (
        ("gpu", "`gpu` is no name of a device"),
        (f"{device.type}:7", "There is no device `.*:7` that torch"),
        ("meta", "There is no device `meta:0` that torch"),
    ):
        with pytest.raises(UsageError, match=f"{said}.* Here there is cpu, {device}; `auto` is the accelerator"):
            device_called(name)
    monkeypatch.setattr(devices, "_doubles", lambda device: device == CPU)
    assert device_called("auto") == CPU
    with pytest.raises(UsageError, match="has no double precision"):
        device_called(device)


def test_a_model_on_two_devices(device: torch.device, net: nn.Module) -> None:
    spread = copy.deepcopy(net)
    spread.get_submodule("head").to(device)
    with pytest.raises(CaptureError, match=rf"\(`one.weight` on cpu, `head.weight` on {device}\). Move it to one"):
        graphopt.optimize(spread, X, "", device="cpu")


def test_a_device_without_memory(net: nn.Module) -> None:
    class Greedy(Scale):
        name = "greedy"

        def plan(self, program: graphopt.Program, ctx: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee documentation.")

    with pytest.raises(PassError, match=r"ran out of memory: .*20.00 GiB. Let the passes run on the CPU"):
        graphopt.optimize(net, X, "greedy", plugins=[Greedy])
