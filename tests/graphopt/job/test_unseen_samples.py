"""What is reported holds on samples that no pass has seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.capturing.load import with_data
from graphopt.ir.program import Program
from graphopt.job.job import Job
from graphopt.measure.equivalence import measure
from graphopt.passes.fold import Fold
from graphopt.pipeline.context import Context
from graphopt.pipeline.pass_base import NoOptions, Pass
from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.plan import Plan

COUNT = 96
PRUNE = "prune:ratio=0.3:round_to=1"


def drawn(count: int, seed: int) -> Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 32)).eval()


def unseen(result: graphopt.Result) -> float:
    return measure(result.original, result.program.call_flat, (drawn(512, 1),)).sqnr


def reported(result: graphopt.Result) -> float:
    error = result.report.rows[-1].error
    assert error is not None
    return error.sqnr


def optimized(model: nn.Module, passes: object, count: int = COUNT) -> graphopt.Result:
    return graphopt.optimize(model, data=drawn(count, 0), passes=passes, target=None, cache=False)  # type: ignore[arg-type]


def test_the_reported_error_is_that_of_unseen_samples_and_recovery_ends_best(model: nn.Module) -> None:
    plain, fitted, trained, both = (
        optimized(model, passes)
        for passes in (f"{PRUNE}:compensate=no", PRUNE, f"{PRUNE}:compensate=no,recover", f"{PRUNE},recover")
    )
    for result in (plain, fitted, trained, both):
        assert abs(reported(result) - unseen(result)) < 1.5  # dB: of 12 samples
    assert unseen(fitted) > unseen(plain) + 2
    assert unseen(both) > max(unseen(fitted), unseen(trained)) - 0.1


class Spy(Pass[NoOptions, Plan]):
    """Reads all that there is to read, and does nothing."""

    name = "spy"

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def plan(self, program: Program, ctx: Context) -> Plan:
        for source in (ctx.need_samples(self.name, "to see it"), ctx.need_held_out(self.name)):
            self.seen.append(torch.cat([x for (x,) in source.batches(8)]))
        return self.new_plan(sites=())

    def apply(self, program: Program, plan: Plan) -> Program:
        return program


def test_passes_of_one_run_share_one_split(model: nn.Module) -> None:
    one, other = Spy(), Spy()
    optimized(model, [one, Fold(), other])
    fitted, judges = one.seen
    assert torch.equal(fitted, other.seen[0])
    assert torch.equal(judges, other.seen[1])
    assert not bool((fitted[:, None] == judges).all(2).any())


def test_no_pass_sees_what_errors_are_taken_on(model: nn.Module) -> None:
    spy = Spy()
    job = Job(*with_data(model, drawn(COUNT, 0)))
    job.run(Pipeline.parse([spy]))
    (probed,) = job._probe.batch
    assert len(probed) + sum(map(len, spy.seen)) == COUNT
    assert not bool((torch.cat(spy.seen)[:, None] == probed).all(2).any())


def test_too_few_samples_are_said(model: nn.Module) -> None:
    note = "data: too few samples to keep some unseen: errors are taken on what passes "
    assert note + "may have fitted" in optimized(model, "svd:rank=8", 8).report.notes
    assert note + "chose by" in optimized(model, "svd:rank=8", 16).report.notes
    for passes, count in (("fold", 8), ("svd:rank=8", 32)):
        assert not any(text.startswith(note) for text in optimized(model, passes, count).report.notes)
