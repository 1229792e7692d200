"""Rows that are kept are of what measures today."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


def test_what_another_machine_measured_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    bench = importlib.import_module("bench_quantization")
    asked: dict[str, Any] = {}

    def run(processor: str, data: Path) -> int:
        machine = {"processor": processor}
        monkeypatch.setattr(bench, "_machine", lambda: machine)
        how = {"targets": ["onnxruntime"], "passes": "int8", "peers": [], "batches": [1], "samples": 8, "seconds": 1.0}
        asked.update(how, engine=False, data=str(data.resolve()), machine=machine)
        measured = mock.Mock(return_value={"model": "resnet18", "how": dict(asked), "problem": "", "tools": {}})
        monkeypatch.setattr(bench, "_in_a_process", measured)
        shown = mock.Mock()
        monkeypatch.setattr(bench, "report", shown)
        bench.main(
            ["resnet18"], False, None, "int8", [], [1], 8, 1.0, data=data, engine=False, results=tmp_path / "rows.json"
        )
        assert shown.call_args.args[0] == shown.call_args.args[1][0]["how"]["machine"] == machine
        return measured.call_count

    assert [run("one", tmp_path), run("one", tmp_path)] == [1, 0]
    assert [run("two", tmp_path), run("two", tmp_path)] == [1, 0]
    assert run("two", tmp_path / "other") == 1
