"""The training loop: whatever it is cut into, it takes the same steps; killed, it goes on where it was."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from graphopt.data.batches import Batch
from graphopt.distillation import loop
from graphopt.distillation.loop import DivergedError, Schedule, Trainer
from graphopt.distillation.optimizer import RelativeAdamW
from graphopt.distillation.pool import Pool
from graphopt.pipeline.context import Context, NoProgress
from tests.graphopt.distillation.small_lesson import Kept, Numbers, fit, student

SHORT = Schedule(epochs=3, rate=0.01)


def test_a_step_is_that_of_adamw_at_a_rate_of_each_tensor() -> None:
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.randn(4, 3) * 10**-at) for at in range(5)] for _ in range(2))
    with torch.no_grad():
        for one, other in zip(ours, theirs, strict=True):
            other.copy_(one)
    one_rate = RelativeAdamW(ours, 0.03)
    groups = [
        {"params": [each], "lr": 0.03 * max(float(each.detach().square().mean().sqrt()), 1e-3)} for each in theirs
    ]
    rates = torch.optim.AdamW(groups, weight_decay=0.0)
    for _ in range(20):
        for one, other in zip(ours[1:], theirs[1:], strict=True):  # the first gets no gradient
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        one_rate.step()
        rates.step()
    torch.testing.assert_close(ours, theirs)


def test_parts_of_a_batch_make_the_same_step() -> None:
    (whole, _), (parts, _) = (fit(student(), Schedule(2, 0.01, parts=count, frozen=True)) for count in (1, 3))
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-5, atol=1e-6)


def test_parts_hold_as_many_samples_as_batch_norm_needs() -> None:
    _, history = fit(student(), Schedule(2, 0.01, parts=8))
    assert all(map(math.isfinite, history.losses))
    assert not history.stopped


def test_two_processes_make_the_same_steps_as_one(tmp_path: Path) -> None:
    one = student()
    for _ in range(2):  # nothing of the first training is left in the next
        alone, _ = fit(one, Schedule(2, 0.01, frozen=True))
    environment = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "ACCELERATE_USE_CPU": "true",
    }
    script = Path(__file__).with_name("small_lesson.py")
    subprocess.run([sys.executable, script, tmp_path], env=environment, check=True, timeout=120)
    for rank in range(2):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert found.keys() == alone.keys()
        for name, tensor in alone.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


class Killed(NoProgress):
    """Ends the run before a step."""

    def __init__(self, at: int) -> None:
        self.at, self.taken = at, 0

    def track(self, steps: Iterable[Any], label: str, total: int | None = None) -> Iterator[Any]:
        for step in steps:
            if self.taken == self.at:
                raise KeyboardInterrupt
            self.taken += 1
            yield step


def test_a_killed_run_goes_on_and_ends_in_the_same_bits() -> None:
    schedule = Schedule(epochs=4, rate=0.01, average=0.9)
    whole, history = fit(student(dropout=0.3), schedule)
    kept = Kept()
    with pytest.raises(KeyboardInterrupt):
        fit(student(dropout=0.3), schedule, progress=Killed(at=7), checkpoints=kept)  # in the second epoch
    rest = Killed(at=-1)
    again, resumed = fit(student(dropout=0.3), schedule, progress=rest, checkpoints=kept)
    assert rest.taken == 12  # of 16
    assert resumed.losses == history.losses
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    assert all(torch.equal(resumed.best[name], tensor) for name, tensor in history.best.items())


def test_a_loss_that_is_not_finite_ends_it_with_the_best_so_far() -> None:
    class Broken(Numbers):
        def loss(self, outputs: Sequence[Tensor], wanted: Any, batch: Batch) -> Tensor:
            self.steps += 1
            return super().loss(outputs, wanted, batch) * (float("nan") if self.steps > 6 else 1)

    one = student()
    _, history = fit(one, SHORT, lesson=Broken())
    assert history.stopped == "the loss was no longer finite after 8 steps"
    assert len(history.losses) == 2
    assert all(bool(tensor.isfinite().all()) for tensor in history.best.values())
    with pytest.raises(DivergedError, match="Training diverged: the loss is not finite after 4 steps"):
        fit(student(), Schedule(1, 1e30))


def test_a_held_out_loss_that_is_not_finite_is_said_and_ends_it() -> None:
    class Unjudged(Numbers):
        def judged(self, outputs: Sequence[Tensor], wanted: Any, batch: Batch) -> Tensor:
            self.steps += 1  # calls: two of each epoch
            return super().judged(outputs, wanted, batch) * (float("nan") if self.steps > good else 1)

    good = 4
    _, history = fit(student(), SHORT, lesson=Unjudged())
    assert history.stopped == "the held-out loss was no longer finite after 8 steps"
    assert len(history.losses) == 2
    assert history.best
    good = 2
    with pytest.raises(DivergedError, match="Training diverged: the held-out loss is not finite after 4 steps"):
        fit(student(), SHORT, lesson=Unjudged())


def test_it_stops_where_it_is_told_to() -> None:
    _, history = fit(student(), Schedule(9, 10.0, patience=2))
    assert history.stopped == "the held-out loss had not fallen for 2 epochs"
    _, history = fit(student(), Schedule(9, 0.01, steps=5))
    assert len(history.losses) == 3  # after four steps and after the fifth
    assert not history.stopped


def test_products_are_computed_in_the_precision_asked_for() -> None:
    class Watched(Numbers):
        def loss(self, outputs: Sequence[Tensor], wanted: Any, batch: Batch) -> Tensor:
            kinds.add(outputs[0].dtype)
            return super().loss(outputs, wanted, batch)

    kinds: set[torch.dtype] = set()
    tensors, history = fit(student(), SHORT, lesson=Watched(), precision="bfloat16")
    assert kinds == {torch.bfloat16}
    assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.float32}
    assert min(history.losses) < history.losses[0]


def test_gradients_are_clipped() -> None:
    plain, _ = fit(student(), Schedule(1, 0.01))
    same, _ = fit(student(), Schedule(1, 0.01, clip=1e9))
    clipped, _ = fit(student(), Schedule(1, 0.01, clip=1e-9))  # so small that the divisor's floor is all there is
    assert all(torch.equal(plain[name], same[name]) for name in plain)
    moved = [name for name, tensor in student().state_dict().items() if not torch.equal(clipped[name], tensor)]
    assert any(not torch.equal(plain[name], clipped[name]) for name in moved)


def test_statistics_of_many_samples_are_estimated_on_some_that_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_ESTIMATED_ON", 64)
    drawn = torch.Generator().manual_seed(1)
    x = torch.randn(1000, 6, generator=drawn)
    many = Pool(((x.sort(0).values, torch.zeros(1000, 3)),))  # of the first in order all statistics would be wrong
    program = student()
    seen: list[int] = []
    counted = loop.estimate_statistics

    def counting(program: Any, batches: Iterable[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        kept = [*batches]
        seen.append(sum(len(batch[0]) for batch in kept))
        return counted(program, kept)

    monkeypatch.setattr(loop, "estimate_statistics", counting)
    trainer = Trainer(program, Numbers(), many, 8)
    found = trainer.estimate(many, Context(original=program).generator)
    assert seen == [64]
    (mean,) = (tensor for name, tensor in found.items() if name.endswith("mean"))
    exact = program.graph_module.get_parameter("0.weight") @ x.mean(0) + program.graph_module.get_parameter("0.bias")
    assert (mean - exact).abs().max() < 0.5
