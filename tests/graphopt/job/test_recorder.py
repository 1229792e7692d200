"""The recorder: what a row says of a program whose outputs are others than the original's."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from graphopt.capturing.capture import capture
from graphopt.ir.program import Program
from graphopt.job.recorder import Recorder
from graphopt.job.report import Report
from graphopt.measure.equivalence import Probe
from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.plan import Plan


class Outputs(nn.Module):
    """Returns so many outputs."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(x * factor for factor in range(1, 1 + self.count))


def program(returned: int, declared: int) -> Program:
    made, other = (capture(Outputs(count), (torch.ones(2, 3),)) for count in (returned, declared))
    return dataclasses.replace(made, outputs=other.outputs)


@pytest.mark.parametrize(
    ("returned", "declared", "error"),
    [(2, 2, 0.0), (1, 1, 0.0), (3, 3, 0.0), (1, 2, math.inf), (1, 3, math.inf), (3, 2, math.inf)],
)
def test_an_output_that_is_declared_and_not_returned_is_not_equal(returned: int, declared: int, error: float) -> None:
    original = program(2, 2)
    recorder = Recorder(Report("m", "fold", "", rows=[]), original, Probe(original, original.flat_examples()))
    step = Pipeline.parse("fold").steps[0]
    recorder.before(step, original, "")
    recorder.after(step, original, program(returned, declared), Plan(pass_name="fold"), "")
    found = recorder.report.rows[0].error
    assert found is not None
    assert (found.max_error, found.sqnr) == (error, -error if error else math.inf)


@pytest.mark.parametrize(("several", "of"), [(False, ""), (True, " for tensorrt")])
def test_what_holds_for_one_of_several_targets_says_so(several: bool, of: str) -> None:
    original = program(2, 2)
    report = Report("m", "fold", "", rows=[])
    recorder = Recorder(report, original, Probe(original, original.flat_examples()), several=several)
    step = Pipeline.parse("fold").steps[0]
    for target in ("", "tensorrt"):
        plan = Plan(pass_name="fold", notes=("slower",), unmet=("1 point",))
        recorder.before(step, original, target)
        recorder.after(step, original, original, plan, target)
    nothing = "it changed nothing (matched 0, rewrote 0)"
    assert report.notes == ["fold: slower", f"fold: {nothing}", f"fold{of}: slower", f"fold{of}: {nothing}"]
    assert report.unmet == ["fold: 1 point", f"fold{of}: 1 point"]
