"""A job: the model and the data are opened once, pipelines run any number of times, targets do not mix."""

from __future__ import annotations

import dataclasses
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt
from graphopt.backends.onnx_backend import OnnxBackend
from graphopt.capturing.load import with_data
from graphopt.cli.gates import Gate
from graphopt.errors import DataError, UsageError
from graphopt.ir.program import Program
from graphopt.job import deliver
from graphopt.job.job import Job
from graphopt.job.report import Latency, Row
from graphopt.measure.bench import Comparison, Spread, TimedPair, Timing
from graphopt.pipeline.context import Context
from graphopt.pipeline.pass_base import NoOptions, Pass
from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.plan import Plan
from graphopt.pipeline.registry import PassRegistry, backends_named
from graphopt.targets.backend import Artifact
from graphopt.testing import fingerprint


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
PRUNE = "prune:ratio=0.5:round_to=1"


def batches(drawn: list[int]) -> Iterator[torch.Tensor]:
    for index in range(4):
        drawn.append(index)
        yield X[16 * index : 16 * index + 16]


def test_a_one_shot_iterator_loses_nothing() -> None:
    """Capture looks at the first batch; the passes see it all the same, and every batch is drawn once."""
    drawn: list[int] = []
    found = graphopt.optimize(model(), batches(drawn), PRUNE, None)
    assert drawn == [0, 1, 2, 3]
    assert fingerprint(found.program) == fingerprint(graphopt.optimize(model(), X, PRUNE, None).program)


def test_a_one_shot_iterator_of_labelled_batches_evaluates_every_model() -> None:
    labels = model()(X).argmax(1)
    pairs = iter([(X[:32], labels[:32]), (X[32:], labels[32:])])
    found = graphopt.optimize(model(), X, "fold", None, eval=pairs)
    assert found.report.original.metric == 100.0
    assert found.report.rows[-1].metric == 100.0


def test_pipelines_run_any_number_of_times() -> None:
    job = graphopt.Job.open(model(), X)
    before = fingerprint(job.original)
    pruned, again = (job.run(Pipeline.parse(PRUNE)) for _ in range(2))
    other = job.run(Pipeline.parse("svd:ratio=0.5"))
    assert fingerprint(job.original) == before
    assert fingerprint(pruned.programs["onnxruntime"]) == fingerprint(again.programs["onnxruntime"])
    assert [row.label for row in other.report.rows] == ["original", "svd:ratio=0.5"]
    one, two = job.deliver(pruned, bench=False), job.deliver(pruned, bench=False)
    assert len(one.report.rows) == len(two.report.rows) == 3
    assert one.artifact.path.read_bytes() == two.artifact.path.read_bytes()
    assert len(pruned.report.rows) == 2  # delivering adds to a copy


def test_an_unknown_check_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="check='slow' is not known"):
        Job(*with_data(model(), X)).run(Pipeline.parse(""), check="slow")


def test_a_report_is_read_in_a_notebook() -> None:
    report = graphopt.optimize(model(), X, "prune:ratio=0.5", eval=(X, model()(X).argmax(1)), bench=False).report
    lines = str(report).splitlines()
    assert len(lines) == 1 + len(report.rows)
    assert lines[1].startswith("original: ")
    assert "100.0 metric" in lines[1]
    assert "bytes on disk" in lines[-1]


def test_a_module_needs_data() -> None:
    with pytest.raises(DataError, match="cannot be captured without example inputs"):
        graphopt.optimize(model())


def test_a_target_given_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="`onnxruntime` is given twice"):
        graphopt.optimize(model(), X, "", "onnxruntime,onnxruntime")


def test_a_backend_has_a_name_that_files_can_bear() -> None:
    class Escaping(type(backends_named("onnxruntime")[0])):  # type: ignore[misc]
        name = "x/../../escaped"

    with pytest.raises(UsageError, match=r"A backend is called 'x/\.\./\.\./escaped'"):
        graphopt.optimize(model(), X, "", Escaping())


def test_a_backend_and_its_description_have_one_name() -> None:
    class Renamed(type(backends_named("onnxruntime")[0])):  # type: ignore[misc]
        name = "mine"

    with pytest.raises(UsageError, match="`mine` describes a target called `onnxruntime`"):
        graphopt.optimize(model(), X, "int8", Renamed())


def test_nothing_pins_a_job() -> None:
    job = graphopt.Job.open(model(), X)
    job.run(Pipeline.parse("int8"))
    program, known = weakref.ref(job.original), weakref.ref(job)
    del job
    gc.collect()
    assert known() is None
    assert program() is None


def test_the_callers_random_state_is_kept() -> None:
    job = Job(*with_data(model(), X), evaluation=lambda _: float(torch.rand(())))
    before = torch.get_rng_state()
    job.deliver(job.run(Pipeline.parse("fold")), bench=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_each_target_has_its_own_bytes_and_the_original_is_lowered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 stores other bytes for each target; both artifacts are compared with the bytes of one lowered original."""
    lowered = _count_lowerings(monkeypatch)
    job = graphopt.Job.open(model(), X, target=["tensorrt", "onnxruntime"])
    found = job.deliver(job.run(Pipeline.parse("int8")), bench=False, sizes=True)
    assert sorted(lowered) == ["onnxruntime.onnx", "original.onnxruntime.onnx", "tensorrt.onnx"]
    costs = {row.target: row.cost for row in found.report.rows if row.label.startswith("int8")}
    for row in found.report.artifact_rows():
        assert row.cost == costs[row.target]
        baseline = found.report.baseline(row)
        assert baseline.target == row.target
        assert baseline.size is not None
    sizes = [found.report.baselines[name].size for name in ("onnxruntime", "tensorrt")]
    assert found.report.original.size == sizes[0] == sizes[1]


def test_the_original_is_not_lowered_where_nothing_is_compared_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = _count_lowerings(monkeypatch)
    found = graphopt.optimize(model(), X, "int8:weights=float", ["onnxruntime", "tensorrt"], bench=False)
    assert sorted(lowered) == ["onnxruntime.onnx", "tensorrt.onnx"]
    said = [note.partition(":")[0] for note in found.report.notes if note.startswith("int8")]
    assert said == ["int8 for onnxruntime", "int8 for tensorrt"]
    assert found.report.baselines == {}
    assert found.report.original.size is None
    assert [row.label for row in found.report.artifact_rows()] == ["onnxruntime.onnx", "tensorrt.onnx"]


def _count_lowerings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that the name of every file is added to that is lowered from now on."""
    lowered: list[str] = []
    lower = OnnxBackend.lower

    def counted(self: OnnxBackend, program: Program, path: Path) -> Artifact:
        lowered.append(path.name)
        return lower(self, program, path)

    monkeypatch.setattr(OnnxBackend, "lower", counted)
    return lowered


def test_data_beside_an_exported_program_are_opened_once(tmp_path: Path) -> None:
    drawn: list[int] = []
    program = graphopt.capture(model(), X[:4])
    found, samples = with_data(program, batches(drawn))
    assert found is program
    assert samples is not None
    assert sum(batch[0].shape[0] for batch in samples.batches(10)) == 64
    assert drawn == [0, 1, 2, 3]


@pytest.mark.parametrize(("passes", "count"), [("", 1), ("fold", 1), (PRUNE, 2)])
def test_an_original_that_nothing_was_rewritten_in_is_lowered_once(
    passes: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered = _count_lowerings(monkeypatch)
    job = graphopt.Job.open(model(), X)
    job.deliver(job.run(Pipeline.parse(passes)), bench=False, sizes=True)
    assert len(lowered) == count


def test_an_original_that_nothing_was_rewritten_in_is_as_fast_as_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly: a gate on it is no matter of chance."""
    monkeypatch.setattr(deliver, "compare", functools.partial(deliver.compare, seconds=0))
    report = graphopt.optimize(model(), X, "").report
    for latency, before in zip(_latencies(report.rows[-1]), _latencies(report.original), strict=True):
        assert (latency.speedup, latency.speedup_spread) == (1.0, None)
        assert dataclasses.replace(latency, speedup=None) == before
    for text, fails in (("speedup<1", False), ("speedup>1", False), ("speedup<=1", True)):
        assert bool(Gate.parse(text).failures(report)) is fails


@pytest.mark.parametrize(("ratio", "slower"), [(0.5, True), (2.0, False)])
def test_an_artifact_that_does_not_pay_says_so(ratio: float, slower: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(*_: object) -> Comparison:
        spreads = [Spread.of([value, value * 1.1]) for value in (1.0, 1.0 / ratio, ratio)]
        timings = [Timing(spread, spread) for spread in spreads[:2]]
        pair = TimedPair(timings[0], timings[1], spreads[2], spreads[2], 2)
        return Comparison(pair, pair, 1, 1)

    monkeypatch.setattr(deliver, "compare", compare)
    notes = graphopt.optimize(model(), X, PRUNE).report.notes
    said = [note for note in notes if "than the original" in note]
    assert [note.split(";")[0] for note in said] == (
        ["onnxruntime: the artifact is slower than the original (0.51-0.54x)"] if slower else []
    )


def test_what_a_busy_machine_does_to_the_clock_is_no_speed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under load 0.37x was reported, without a word, of what takes half the processor time."""
    time, cpu = Spread.of([1.0, 1.1]), Spread.of([1.9, 2.0, 2.1])
    pair = TimedPair(Timing(time, time), Timing(time, time), Spread.of([0.29, 0.37, 3.8]), cpu, 3)
    monkeypatch.setattr(deliver, "compare", lambda *_: Comparison(pair, pair, 1, 1))
    report = graphopt.optimize(model(), X, PRUNE).report
    assert "2.00x (1.95-2.05) speed-up" in str(report).splitlines()[-1]
    assert not Gate.parse("speedup<1.5").failures(report)
    (said,) = [note for note in report.notes if "the machine was busy" in note]
    assert "0.37x (0.33-2.08) by the clock, 2.00x (1.95-2.05) by processor time" in said
    assert "`graphopt bench`" in said


def test_an_artifact_that_grows_says_so() -> None:
    row, before = Row("a.onnx", size=300), Row("original", size=200)
    assert deliver._what_does_not_pay(row, None, True) == []
    (said,) = deliver._what_does_not_pay(row, before, False)
    assert said.startswith("the artifact is larger than the original (1.50x); leave out passes")


@pytest.mark.parametrize(("size", "quantized", "count"), [(991, True, 1), (991, False, 0), (989, True, 0)])
def test_an_artifact_that_is_quantized_for_nothing_says_so(size: int, quantized: bool, count: int) -> None:
    said = deliver._what_does_not_pay(Row("a.onnx", size=size), Row("original", size=1000), quantized)
    assert len(said) == count
    assert all(
        text.startswith("the artifact is quantized and hardly smaller than the original (99.1%") for text in said
    )


def _latencies(row: Row) -> list[Latency]:
    assert row.latency is not None
    assert row.plain is not None
    return [row.latency, row.plain]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda mine: mine.double(), "`0.weight` was float32 and is float64"),
        (lambda mine: nn.init.zeros_(mine[2].bias), "`2.bias` was written to"),
    ],
)
def test_a_module_changed_after_the_job_was_opened_is_refused(change: Callable[[nn.Module], object], said: str) -> None:
    mine = model()
    job = Job.open(mine, X)
    outcome = job.run(Pipeline.parse(""))
    change(mine)
    for work in (lambda: job.run(Pipeline.parse("")), lambda: job.deliver(outcome)):
        with pytest.raises(UsageError, match=f"The model was changed after the job was opened on it: {said}. Open"):
            work()


def test_a_program_that_tensors_were_added_to_or_taken_from_is_refused() -> None:
    program = graphopt.capture(model(), X[:2])
    job = Job.open(program, X)
    for change, said in (
        (lambda gm: gm.register_buffer("late", torch.ones(1)), "`late` was added"),
        (lambda gm: delattr(gm, "late") or delattr(gm.get_submodule("0"), "bias"), "`0.bias` was removed"),
    ):
        change(job._given.graph_module)  # type: ignore[no-untyped-call]
        with pytest.raises(UsageError, match=f"opened on it: {said}"):
            job.run(Pipeline.parse(""))


class Buffered(nn.Module):
    """Holds a factor that is not trained."""

    def __init__(self, _: int) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.factor.mul_(2)
        return x * self.factor


@pytest.mark.parametrize(
    ("layer", "shape", "moved"),
    [
        (nn.BatchNorm1d, (16, 4), "running_mean"),
        (functools.partial(nn.InstanceNorm1d, track_running_stats=True), (16, 4, 2), "running_mean"),
        (Buffered, (16, 4), "factor"),
    ],
)
def test_a_module_whose_buffers_moved_after_the_job_was_opened_is_refused(
    layer: Callable[[int], nn.Module], shape: tuple[int, ...], moved: str
) -> None:
    mine, data = nn.Sequential(layer(4), nn.ReLU()).eval(), torch.randn(shape)
    job = Job.open(mine, data, target=None)
    job.run(Pipeline.parse("fold"))
    mine(data)
    job.run(Pipeline.parse("fold"))
    with torch.no_grad():
        mine.train()(data)
    with pytest.raises(UsageError, match=rf"after the job was opened on it: `0\.{moved}` was written to"):
        job.run(Pipeline.parse("fold"))


def test_an_outcome_whose_program_was_trained_is_not_delivered_again() -> None:
    job = Job.open(model(), X)
    outcome = job.run(Pipeline.parse(PRUNE))
    found = job.undelivered(outcome)
    before = fingerprint(job.undelivered(outcome).program)
    with torch.no_grad():
        for parameter in found.program.parameters():
            parameter.data.mul_(2)
    for again in (job.deliver, job.undelivered):
        with pytest.raises(UsageError, match="for onnxruntime was changed after it was handed out in a result"):
            again(outcome)
    assert fingerprint(job.undelivered(job.run(outcome.pipeline)).program) == before


class Chooses(Pass[NoOptions, Plan]):
    """Writes down what the metric says, and misses what was asked for."""

    name = "chooses"
    chooses_by_metric = True
    has_goal = True

    def plan(self, program: Program, ctx: Context) -> Plan:
        assert ctx.metric is not None
        return self.new_plan(sites=(), measured={"metric": ctx.metric(program)}, unmet=("max_drop=0: 1 point",))

    def apply(self, program: Program, plan: Plan) -> Program:
        raise AssertionError("it rewrites nothing")


def test_what_passes_choose_by_is_not_what_reports_are_made_of() -> None:
    right = model()(X).argmax(1)
    order = torch.arange(64)
    labels = torch.where(order < 32, right, (right + 1) % 4)  # half are right
    job = Job.open(model(), X, target=None, eval=(X, labels))
    registry = PassRegistry([Chooses])
    outcome = job.run(Pipeline.parse("chooses", registry))
    chosen = next(plan for _, plan in outcome.plans).measured["metric"]
    reported = outcome.report.original.metric
    assert isinstance(chosen, float)
    assert reported is not None
    sizes = [sum(len(y) for _, y in half.batches() if y is not None) for half in job.metric.halves()]  # type: ignore[union-attr]
    assert sum(sizes) == 64
    assert (chosen * sizes[0] + reported * sizes[1]) / 64 == pytest.approx(50)
    assert outcome.report.rows[-1].metric == reported
    assert outcome.report.unmet == ["chooses: max_drop=0: 1 point"]
    assert any("half of the labelled samples chose" in note for note in outcome.report.notes)
    assert job.run(Pipeline.parse("")).report.original.metric == 50  # where none chooses, all are reported on
    asked = Job.open(model(), X, target=None, eval=lambda found: float(found(X).sum()))
    notes = asked.run(Pipeline.parse("chooses", registry)).report.notes
    assert any("the function that passes chose by also judges" in note for note in notes)
