"""What is said of a run before its table."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest

from graphopt.cli import progress
from graphopt.cli.app import run
from tests.graphopt.cli.conftest import Files


@pytest.mark.parametrize("terminal", [True, False])
def test_each_step_is_told(
    files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert run(["optimize", "model.pt", "--passes", "svd,int8", "--data", "data.npz", "--eval", "labelled.npz"]) == 0
    lines = capsys.readouterr().err.splitlines()
    said = [re.fullmatch(r" +\d+\.\d s  (.*)", line) for line in lines]
    texts = [found[1] if found else "" for found in said]
    names = ["model.pt", "original", "svd", "fold", "int8 for onnxruntime", "onnxruntime"]
    assert [text.partition(":")[0] for text in texts] == names
    assert re.fullmatch(r"int8 for onnxruntime: matched \d+, rewrote \d+, left \d+ .*", texts[-2])
    assert texts[-1] == "onnxruntime: lowered, verified and timed"


def test_a_long_loop_says_now_and_then_how_far_it_is_where_no_terminal_shows_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 20))  # seconds
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    assert list(progress.TerminalProgress().track(range(5), "calibrating")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err.splitlines() == ["   40.0 s  calibrating: 1 of 5", "   80.0 s  calibrating: 3 of 5"]
    shown = progress.TerminalProgress()
    for step in shown.track(range(4), "training"):
        shown.numbers("training", step, {"loss": 1 / (step + 1)})
    assert capsys.readouterr().err.splitlines() == [
        "   40.0 s  training: 1 of 4, loss 1",
        "   80.0 s  training: 3 of 4, loss 0.333",
    ]
