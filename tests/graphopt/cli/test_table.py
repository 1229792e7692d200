"""The tables on terminals of any width."""

from __future__ import annotations

import dataclasses
import io

import pytest

from graphopt.cli.table import print_report, terminal
from graphopt.job.report import Latency, Report, Row
from graphopt.measure.cost import Cost
from graphopt.measure.equivalence import Equivalence
from graphopt.pipeline.plan import Refusal

LABELS = ["prune:flops=0.55", "svd", "int8", "onnxruntime.onnx"]


def report(*, timed: bool) -> Report:
    latency = Latency("recorded", 1, 0.412, (0.401, 0.433))
    faster = Latency("recorded", 1, 0.178, (0.171, 0.189), 2.31, (2.18, 2.44))
    error = Equivalence(0.1, 1.2e-2, 34.0, 0.991)
    slower = latency if timed else None
    original = Row("original", cost=Cost(865_000, 34_500_000, 3_460_000), size=3_330_000, metric=99.44, latency=slower)
    rows = [Row(label, cost=Cost(412_000, 15_100_000, 1_650_000), error=error, metric=99.3) for label in LABELS[:3]]
    artifact = Row(LABELS[3], "onnxruntime", size=492_000, error=error, metric=100.0, latency=faster if timed else None)
    made = Report("model.pt", "prune:flops=0.55,svd,fold,int8", "top1", [original, *rows, artifact])
    made.baselines["onnxruntime"] = Row("original", size=3_330_000, latency=latency if timed else None)
    made.rows[0] = Row(
        "original", cost=original.cost, size=original.size, metric=99.44, latency=made.baselines["onnxruntime"].latency
    )
    made.refusals = [("prune", Refusal("conv1", "3 channels left, minimum is 8", "too few channels"))]
    return made


def printed(width: int, *, timed: bool) -> list[str]:
    return shown(report(timed=timed), width)


def shown(made: Report, width: int) -> list[str]:
    stream = io.StringIO()
    print_report(made, terminal(width=width, file=stream))
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("text", ["[red]", "[/x]", "[link=http://x]y[/link]", ":fire:", "\\[x]", "[", "a[0]"])
def test_text_is_printed_as_it_is(text: str) -> None:
    """A name with what rich takes for a closing tag once ended in a traceback, and `:fire:` in a flame."""
    made = report(timed=False)
    made.model = made.pipeline = made.metric = text
    made.notes = [text]
    made.refusals = [(text, Refusal(text, text, text))]
    made.rows.append(Row(text, summary=text))
    assert "\n".join(shown(made, 400)).count(text) >= 8


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("width", [80, 100, 120, 150])
def test_every_row_keeps_its_name_and_its_metric(width: int, timed: bool) -> None:
    lines = printed(width, timed=timed)
    assert max(map(len, lines)) <= width
    for label in LABELS:
        (line,) = [line for line in lines if line.strip().startswith(label)]
        assert line.rstrip().endswith("100.00" if label == LABELS[3] else "99.30")
    assert "…" not in "\n".join(lines)


def test_what_was_not_paired_is_not_called_so() -> None:
    made = report(timed=True)
    assert any("batch 1, median of paired calls" in line for line in shown(made, 150))
    latency = Latency("recorded", 1, 0.412, (0.401, 0.433), 1.0)
    made.rows[-1] = dataclasses.replace(made.rows[-1], latency=latency)
    lines = shown(made, 150)
    assert any(" 1.00x  " in line for line in lines)
    assert any("batch 1, median of calls" in line for line in lines)


def test_a_narrow_terminal_shows_the_spread_below() -> None:
    assert any("2.31x (2.18-2.44)" in line for line in printed(150, timed=True))
    narrow = printed(80, timed=True)
    assert any("2.31x" in line for line in narrow)
    assert not any("onnxruntime.onnx" in line and "(2.18" in line for line in narrow)
    assert "quartiles of the speed-up 2.18-2.44" in " ".join(" ".join(narrow).split())


@pytest.mark.parametrize("metric", ["top1", "agreement_with_the_teacher"])
@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_the_step_gives_way_and_no_number_does(width: int, metric: str) -> None:
    made = report(timed=True)
    made.metric = metric
    made.rows[3] = dataclasses.replace(made.rows[3], label="int8:observer=minmax", target="onnxruntime")
    made.rows[4] = dataclasses.replace(made.rows[4], cost=made.rows[3].cost)
    lines = shown(made, width)
    assert width < 80 or max(map(len, lines)) <= width
    assert "…" not in "".join(lines)
    words = [word for line in lines for word in line.split()]
    wanted = {"865k": 1, "34.5M": 1, "3.33MB": 1, "412k": 4, "15.1M": 4, "492kB": 1, "0.412": 1, "0.178": 1, "2.31x": 1}
    wanted |= {"1.2e-02": 4, "99.44": 1, "99.30": 3, "100.00": 1}
    assert {word: words.count(word) for word in wanted} == wanted


def test_no_more_is_left_out_than_has_to_be() -> None:
    lines = printed(120, timed=True)
    (artifact,) = [line for line in lines if LABELS[3] in line]
    assert "492kB (6.8x smaller)" in artifact
    assert "2.31x (2.18-2.44)" in artifact
    assert any("412k (48%)  15.1M (44%)" in line for line in lines)
    full = shown(report(timed=True), 142)  # what fits with less room between columns is whole
    assert any("0.178 ms (0.171-0.189)" in line and "1.2e-02 (34 dB)" in line for line in full)
