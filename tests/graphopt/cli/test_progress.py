"""What a terminal shows of a run before its table."""

from __future__ import annotations

import re
import sys

import pytest

from graphopt.cli.app import run
from tests.graphopt.cli.conftest import Files


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_is_told_each_step_and_nothing_else_is(
    files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert run(["optimize", "model.pt", "--passes", "svd,int8", "--data", "data.npz", "--eval", "labelled.npz"]) == 0
    lines = capsys.readouterr().err.splitlines()
    if not terminal:
        assert lines == []
        return
    said = [re.fullmatch(r" +\d+\.\d s  (.*)", line) for line in lines]
    texts = [found[1] if found else "" for found in said]
    names = ["model.pt", "original", "svd", "fold", "int8 for onnxruntime", "onnxruntime"]
    assert [text.partition(":")[0] for text in texts] == names
    assert re.fullmatch(r"int8 for onnxruntime: matched \d+, rewrote \d+, left \d+ .*", texts[-2])
    assert texts[-1] == "onnxruntime: lowered, verified and timed"
