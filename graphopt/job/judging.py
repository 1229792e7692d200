"""What programs of a job are judged by: the user's metric, and the inputs that errors are measured on."""

from __future__ import annotations

from typing import Any, TypeAlias

from graphopt.data.batches import Batch, SampleSource, batch_count, whole_batches
from graphopt.ir.program import Program
from graphopt.measure.cost import cost
from graphopt.measure.evaluate import Evaluator, FunctionEvaluator, evaluator
from graphopt.pipeline.context import Progress
from graphopt.pipeline.pipeline import Pipeline

Judge: TypeAlias = Evaluator | FunctionEvaluator

# Samples that every row's output error is measured on: as many as cost this many operations, within bounds.
_PROBE_FLOPS = 2e10
_FEWEST_PROBES, _MOST_PROBES = 2, 32


def judge_of(spec: Any, program: Program, progress: Progress) -> Judge:
    """Return what `eval` of a job says of models like a program."""
    return evaluator(spec, specs=program.inputs, takes=program.takes, device=program.device, track=progress.track)


def metrics_for(pipeline: Pipeline, judge: Judge | None) -> tuple[Judge | None, Judge | None, list[str]]:
    """Return what passes of a pipeline choose by, what reports are made of, and what a user should know of it.

    Where a pass chooses by labelled data, it gets half of them, and reports are made of the other half.
    """
    if judge is None or not any(step.instance.chooses_by_metric for step in pipeline.steps):
        return None, judge, []
    if isinstance(judge, FunctionEvaluator):
        said = "eval: the function that passes chose by also judges; give labelled data, of which half is kept unseen"
        return judge, judge, [said]
    said = f"eval: half of the labelled samples chose, and `{judge.name}` in this report is of the other half"
    return *judge.halves(), [said]


def probe_inputs(program: Program, samples: SampleSource | None) -> Batch:
    """Return the inputs that errors are measured on: real samples if there are any."""
    if samples is None:
        return program.flat_examples()
    affordable = int(_PROBE_FLOPS // max(cost(program).flops, 1))
    count = min(max(affordable, _FEWEST_PROBES), _MOST_PROBES)
    batches = whole_batches(samples, count, count, takes=program.takes)
    return max(batches, key=batch_count, default=program.flat_examples())  # the first, but for unlike shapes
