"""Stopwatch: a wider program takes longer, whichever way round they are asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphopt.capturing.capture import capture
from graphopt.errors import PassError
from graphopt.ir.program import Program
from graphopt.job.optimizing import optimize
from graphopt.measure.stopwatch import Stopwatch
from graphopt.pipeline.context import Context
from graphopt.pipeline.pass_base import NoOptions, Pass
from graphopt.pipeline.plan import Plan
from graphopt.pipeline.registry import backend

IMAGE = torch.zeros(2, 8, 16, 16)


def program_of(width: int) -> Program:
    return capture(nn.Sequential(nn.Conv2d(8, width, 3), nn.ReLU(), nn.Conv2d(width, 8, 3)), (IMAGE,))


def test_ratios_are_of_the_first_to_the_second() -> None:
    stopwatch = Stopwatch(backend("onnxruntime"), seconds=0.1)
    narrow, wide = program_of(16), program_of(1024)
    assert stopwatch(narrow, wide).upper < 0.5
    assert stopwatch(wide, narrow).lower > 2


class _AsksForLatencyAndLoss(Pass[NoOptions, Plan]):
    """Does nothing but ask."""

    name = "asks"
    reads_target = True

    def plan(self, program: Program, ctx: Context) -> Plan:
        same = ctx.need_timer(self.name)(program, ctx.original)
        assert ctx.loss is not None
        assert ctx.samples is not None
        labels = [given for _, given in ctx.samples.labelled_batches(2)]
        value = float(ctx.loss(program(IMAGE), labels[0]).detach())
        return self.new_plan(sites=(), measured={"ratio": same.median, "loss": value})

    def apply(self, program: Program, plan: Plan) -> Program:
        return program


def _loss(output: Tensor, labels: Tensor | None) -> Tensor:
    assert labels is not None
    return output.mean() * 0 + labels.sum()


def test_optimize_hands_both_to_a_pass() -> None:
    labels = torch.tensor([3, 4])
    data = {"input": IMAGE, "labels": labels}
    result = optimize(program_of(16), data, [_AsksForLatencyAndLoss], loss=_loss, lower=False)
    measured = result.plans[0].measured
    assert 0.3 < measured["ratio"] < 3  # type: ignore[operator]
    assert measured["loss"] == 7


def test_a_runtime_that_does_not_execute_here_is_named() -> None:
    with pytest.raises(PassError, match=r"Pass `asks` is to decide by measured latency, and `tensorrt`.*onnxruntime"):
        optimize(program_of(16), IMAGE, [_AsksForLatencyAndLoss], "tensorrt", lower=False)
