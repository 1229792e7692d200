"""Gates: what they read, and what they say."""

from __future__ import annotations

import math

import pytest

from graphopt.cli.gates import Gate, check
from graphopt.errors import GateError, UsageError
from graphopt.job.report import Latency, Report, Row
from graphopt.measure.equivalence import Equivalence

REPORT = Report(
    "model.pt",
    "int8",
    "top1",
    rows=[
        Row("original", size=1000, metric=80.0),
        Row("int8", metric=79.0),
        Row(
            "onnxruntime.onnx",
            target="onnxruntime",
            size=250,
            metric=78.0,
            error=Equivalence(0.1, 0.02, 40.0, 0.99),
            latency=Latency("recorded options, 1 thread", 1, 2.0, (1.9, 2.1), 3.0, (2.9, 3.1)),
        ),
    ],
)


@pytest.mark.parametrize(
    ("text", "fails"),
    [
        ("drop>1.5", True),
        ("drop>2", False),
        ("drop%>2.4", True),
        ("drop%>=2.5", True),
        ("drop%>2.5", False),
        ("size>0.25", False),
        ("size >= 0.25", True),
        ("speedup<3.5", True),
        ("speedup<2", False),
        ("error>1e-3", True),
        ("agreement<0.999", True),
    ],
)
def test_gates(text: str, fails: bool) -> None:
    assert bool(Gate.parse(text).failures(REPORT)) is fails


def test_a_failure_says_value_and_gate() -> None:
    assert Gate.parse("drop>0.5").failures(REPORT) == ["drop is 2 for onnxruntime.onnx, gate is drop>0.5"]


def test_a_goal_that_a_pass_missed_fails_without_a_gate() -> None:
    check([], REPORT)
    missed = Report("m", "p", rows=REPORT.rows, unmet=["mixed: max_drop=1.0: 1.5 points are lost"])
    with pytest.raises(GateError, match=r"mixed: max_drop=1.0: 1.5 points are lost\.$"):
        check([], missed)


def test_without_an_artifact_the_last_pass_counts() -> None:
    report = Report("m", "p", "top1", rows=REPORT.rows[:2])
    assert Gate.parse("drop>0.5").failures(report) == ["drop is 1 for int8, gate is drop>0.5"]


@pytest.mark.parametrize("text", ["", "drop", "drop>", "drop>x", "accuracy<1", "drop=1"])
def test_unreadable(text: str) -> None:
    with pytest.raises(UsageError, match=r'Cannot read --fail-if.*such as "drop>0\.5"; quantities are drop, drop%'):
        Gate.parse(text)


def test_a_gate_on_what_was_not_measured() -> None:
    report = Report("m", "p", rows=[Row("original"), Row("int8")])
    with pytest.raises(UsageError, match=r"gate drop>1 has nothing to look at:.*points of the --eval.*Give --eval\."):
        Gate.parse("drop>1").failures(report)


def test_a_gate_looks_at_the_artifacts_that_have_the_quantity(caplog: pytest.LogCaptureFixture) -> None:
    report = Report("m", "p", rows=[REPORT.rows[0], Row("tensorrt.onnx", target="tensorrt", size=300), REPORT.rows[2]])
    assert Gate.parse("speedup<3.5").failures(report) == ["speedup is 3 for onnxruntime.onnx, gate is speedup<3.5"]
    assert "the gate speedup<3.5 says nothing of tensorrt.onnx" in caplog.text
    assert [text.split(" for ")[1] for text in Gate.parse("size>0.1").failures(report)] == [
        "tensorrt.onnx, gate is size>0.1",
        "onnxruntime.onnx, gate is size>0.1",
    ]


def test_all_gates_that_fail_are_named() -> None:
    with pytest.raises(GateError) as caught:
        check([Gate.parse(text) for text in ("drop>0.5", "size>0.9", "speedup<4")], REPORT)
    assert str(caught.value) == (
        "drop is 2 for onnxruntime.onnx, gate is drop>0.5; speedup is 3 for onnxruntime.onnx, gate is speedup<4."
    )


def test_all_gates_that_hold() -> None:
    check([Gate.parse(text) for text in ("drop>3", "size>0.9", "speedup<2")], REPORT)


@pytest.mark.parametrize("text", ["error>1e9", "error<0", "agreement<0", "agreement>2", "speedup<0"])
def test_what_is_not_a_number_fails_every_gate(text: str) -> None:
    nan = math.nan
    row = Row("a", size=1, error=Equivalence(nan, nan, nan, nan), latency=Latency("s", 1, nan, (nan, nan), nan))
    assert Gate.parse(text).failures(Report("m", "p", rows=[Row("original"), row])) != []


@pytest.mark.parametrize(
    ("before", "after", "text", "fails"),
    [
        (80.0, math.nan, "drop>0.5", True),
        (80.0, math.nan, "drop%>0.5", True),
        (math.nan, 80.0, "drop>0.5", True),
        (math.nan, 80.0, "drop%<-5", True),
        (math.inf, math.inf, "drop>0.5", True),
        (0.0, math.nan, "drop%<-5", True),
        (0.0, -math.nan, "drop%>5", True),
        (0.0, -1.0, "drop%>50", True),
        (0.0, 1.0, "drop%>50", False),
        (0.0, 0.0, "drop%>50", False),
    ],
)
def test_metrics_that_are_zero_or_undefined(before: float, after: float, text: str, fails: bool) -> None:
    report = Report("model.pt", "int8", "r2", rows=[Row("original", metric=before), Row("int8", metric=after)])
    assert bool(Gate.parse(text).failures(report)) is fails
