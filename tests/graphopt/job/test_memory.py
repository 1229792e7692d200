"""What a run holds: one copy of the weights, nobody's but the user's own, and nothing that nobody reads again."""

from __future__ import annotations

import copy
import errno
import gc
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

import graphopt
from graphopt.backends.onnx_execution.session import OnnxSession
from graphopt.errors import UsageError
from graphopt.ir import exporting, memory
from graphopt.ir.ownership import storage_keys
from graphopt.ir.program import Program
from graphopt.job import deliver, manifest, payloads
from graphopt.pipeline.context import Context
from graphopt.pipeline.hooks import Hook
from graphopt.pipeline.order import Step
from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.plan import Plan
from graphopt.testing import fingerprint
from tests.graphopt.toy_passes import Scale, ScaleOptions
from tests.models import Residual, example

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
PRUNE = "prune:ratio=0.5:round_to=1"


class Normed(nn.Module):
    """Two layers, a norm that no pass rewrites, and a weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.norm = nn.Linear(8, 32), nn.Linear(32, 8), nn.LayerNorm(8)
        self.tied = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.tied.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run."""
        return self.again(self.tied(self.norm(self.second(self.first(x).relu()))))


def model() -> nn.Module:
    return Normed().eval()


def state(module: nn.Module) -> dict[str, Any]:
    """Return everything a pass could have changed of a user's module."""
    return {
        name: (tensor.detach().clone(), tensor._version, tensor.data_ptr(), tensor.requires_grad, tensor.grad)
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }


class Watch(Hook):
    """Compares a module with what it was after every step."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.held, self.steps = module, state(module), [""]

    def after(self, step: Step, before: Program, after: Program, plan: Plan, target: str) -> None:
        self.steps.append(step.name)
        for name, (tensor, *rest) in state(self.module).items():
            was, *others = self.held[name]
            assert torch.equal(tensor, was), f"{step.name} changed {name}"
            assert rest == others, f"{step.name} changed {name}"


def test_a_job_reads_the_modules_own_weights() -> None:
    mine = model()
    job = graphopt.Job.open(mine, X)
    assert storage_keys(job.original.graph_module) == storage_keys(mine)


@pytest.mark.parametrize(
    "passes",
    [
        "fold,prune:flops=0.6:criterion=taylor:round_to=1,svd:energy=0.9,int8",
        "drop_blocks:blocks=1,recover:epochs=1:samples=32,sparsity24",
        "prune:ratio=0.4:round_to=1:steps=2,distill_hooks:taps=auto",
    ],
)
def test_no_pass_writes_to_the_users_weights(passes: str) -> None:
    torch.manual_seed(0)
    mine = Residual().eval()
    watch = Watch(mine)
    graphopt.optimize(mine, example(Residual, 64), passes, hooks=[watch], lower=False)
    assert len(watch.steps) > passes.count(",") + 1


def test_a_model_that_counts_its_calls_is_as_it_was() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.layer(x)

    mine = Counting()
    graphopt.optimize(mine, X, "", None)
    assert mine.calls == 0


@pytest.mark.parametrize("passes", ["", "svd:energy=0.9999", PRUNE])
def test_who_trains_what_came_of_it_does_not_train_the_module(passes: str) -> None:
    """Nor the original, nor what the job makes of it once more, where a pass has found nothing to do either."""
    mine = model()
    job = graphopt.Job.open(mine, X, target=None)
    found = job.undelivered(job.run(Pipeline.parse(passes)))
    assert found.original is not None
    assert not storage_keys(found.program.graph_module) & storage_keys(mine)
    before, expected = copy.deepcopy(mine.state_dict()), [fingerprint(found.original), fingerprint(found.program)]
    with torch.no_grad():
        for parameter in found.program.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in mine.state_dict().items())
    again = job.undelivered(job.run(Pipeline.parse(passes)))
    assert [fingerprint(found.original), fingerprint(again.program)] == expected


def test_tied_weights_stay_tied_and_targets_share_what_they_had_in_common() -> None:
    mine = model()
    job = graphopt.Job.open(mine, X, target="onnxruntime,tensorrt")
    found = job.undelivered(job.run(Pipeline.parse("int8:skip=*")))
    one, other = (storage_keys(program.graph_module) for program in found.programs.values())
    assert one == other
    assert len(one) == len(storage_keys(mine))


def test_a_program_that_was_given_keeps_its_tensors() -> None:
    program = graphopt.capture(model(), X[:2])
    found = graphopt.optimize(program, X, "", None)
    assert found.program is program
    assert storage_keys(found.program.graph_module) == storage_keys(program.graph_module)


@pytest.mark.parametrize("passes", ["", PRUNE])
def test_what_is_saved_is_what_was_captured_though_the_module_was_trained_since(
    passes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = model()
    expected = graphopt.optimize(model(), X, passes, bench=False)
    found = graphopt.optimize(mine, X, passes, bench=False)
    with torch.no_grad():
        for parameter in mine.parameters():
            parameter.zero_()
    monkeypatch.setattr(exporting, "_export", lambda *_: pytest.fail("exported again"))
    found.save(tmp_path)
    loaded = graphopt.load(tmp_path / "program.pt2")
    assert fingerprint(found.program) == fingerprint(expected.program)
    torch.testing.assert_close(loaded(X), expected.program(X), rtol=0, atol=0)
    assert found.fingerprint == expected.fingerprint


def sessions() -> int:
    gc.collect()
    return sum(type(held) is OnnxSession for held in gc.get_objects())


def test_no_session_waits_while_others_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each holds the weights once more."""
    held: list[int] = []

    def compare(*given: Any) -> Any:
        held.append(sessions())
        raise KeyboardInterrupt

    monkeypatch.setattr(deliver, "compare", compare)
    with pytest.raises(KeyboardInterrupt):
        graphopt.optimize(model(), X, PRUNE)
    assert held == [0]


class Analysing(Scale):
    """Asks for what is found out once about every program."""

    name = "analysing"

    def plan(self, program: Program, ctx: Context) -> Plan:
        ctx.analysis(program, "held", lambda: object())
        return super().plan(program, ctx)


def test_nothing_pins_a_program_that_no_pass_reads_again() -> None:
    job = graphopt.Job.open(model(), X)
    seen: list[weakref.ref[Any]] = []
    alive: list[int] = []

    class Programs(Hook):
        def before(self, step: Step, program: Program, target: str) -> None:
            gc.collect()
            alive.append(sum(module() is not None for module in seen))

        def after(self, step: Step, before: Program, after: Program, plan: Plan, target: str) -> None:
            seen.append(weakref.ref(after.graph_module))

    outcome = job.run(Pipeline.parse([Analysing(ScaleOptions(factor=0.5)) for _ in range(4)]), hooks=[Programs()])
    gc.collect()
    assert alive == [0, 1, 1, 1]  # what the step reads
    assert [module() for module in seen] == [None, None, None, outcome.programs["onnxruntime"].graph_module]


def test_saving_gives_temporary_files_a_second_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    found = graphopt.optimize(model(), X, "", bench=False)
    there = found.artifact.path.stat().st_ino
    found.save(tmp_path / "one")
    assert (tmp_path / "one" / "onnxruntime.onnx").stat().st_ino == there
    found.save(tmp_path / "two")  # what is somebody's file already is copied
    assert (tmp_path / "two" / "onnxruntime.onnx").stat().st_ino != there
    assert (tmp_path / "one" / "onnxruntime.onnx").stat().st_nlink == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_saving_to_another_file_system_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    found = graphopt.optimize(model(), X, PRUNE, bench=False)
    before = found.artifact.path.read_bytes()
    found.save(tmp_path / "out")
    assert (tmp_path / "out" / "onnxruntime.onnx").read_bytes() == before
    assert graphopt.open(tmp_path / "out").artifact.session()(X.numpy())[0].shape == (64, 8)


def test_a_save_that_fails_leaves_the_result_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = graphopt.optimize(model(), X, PRUNE, bench=False)

    def full(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr(manifest, "save_file", full)
        with pytest.raises(UsageError, match=r"the disk may be full \(I/O error: No space left"):
            found.save(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    assert found.artifact.path.is_file()
    found.save(tmp_path / "out")
    graphopt.open(tmp_path / "out")
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1


def test_a_payload_that_no_program_reads_lies_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = graphopt.Job.open(model(), X)
    kept = graphopt.Job.open(model(), X).run(Pipeline.parse(f"{PRUNE},int8:guard=none"))
    monkeypatch.setattr(memory, "LARGE", 1)
    made: list[weakref.ref[torch.Tensor]] = []

    class Payloads(Hook):
        def planned(self, step: Step, plan: Plan, target: str) -> None:
            made.extend(weakref.ref(tensor) for tensor in plan.tensors.values() if step.name == "prune")

    aside = job.run(Pipeline.parse(f"{PRUNE},int8:guard=none"), hooks=[Payloads()])
    gc.collect()
    assert made
    assert not any(tensor() is not None for tensor in made)
    for (_, plan), (_, same) in zip(aside.plans, kept.plans, strict=True):
        assert plan.to_json() == same.to_json()
        assert [*plan.tensors] == [*same.tensors]
        assert all(torch.equal(tensor, same.tensors[name]) for name, tensor in plan.tensors.items())
    integers = aside.plans[-1][1].tensors
    read = {tensor.data_ptr() for tensor in aside.programs["onnxruntime"].state_dict().values()}
    assert read & {tensor.data_ptr() for tensor in integers.values()}
    job.deliver(aside, bench=False).save(tmp_path / "aside")
    job.deliver(kept, bench=False).save(tmp_path / "kept")
    for name in ("plans.safetensors", "manifest.json", "onnxruntime.onnx"):
        assert (tmp_path / "aside" / name).read_bytes() == (tmp_path / "kept" / name).read_bytes()


def test_a_payload_stays_in_memory_where_there_is_no_room_for_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(memory, "LARGE", 1)
    monkeypatch.setattr(memory, "save_file", full)
    plan = Plan(pass_name="scale", tensors={"weight": torch.ones(4)})
    assert payloads.set_aside([("", plan)], []) == (("", plan),)
