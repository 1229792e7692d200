"""Bad input: one clear sentence, the right exit code, no traceback, nothing half-written."""

from __future__ import annotations

import errno
import io
import os
import re
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from graphopt.cli import app
from graphopt.cli.app import run
from tests.graphopt.cli.conftest import Fails, Files, small_net

LOWER = ("optimize", "model.pt", "--passes", "int8", "--data", "data.npz")


def leftovers(folder: Path) -> list[str]:
    """List what a run left beside the user's own files."""
    return sorted(p.name for p in folder.iterdir() if p.name not in {"model.pt", "data.npz", "labelled.npz", "bad"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"just some text\n", "text"),
        (b"\x80\x04K\x01.", "pickle"),
    ],
)
def test_files_that_are_no_models(files: Files, fails: Fails, content: bytes, message: str) -> None:
    (files.folder / "bad").write_bytes(content)
    assert message in fails(3, "optimize", "bad").lower()
    assert leftovers(files.folder) == []


def test_a_missing_file(files: Files, fails: Fails) -> None:
    said = fails(3, "optimize", "modle.pt")
    assert said == "There is no file `modle.pt`. Did you mean `model.pt`?"


def test_a_directory(files: Files, fails: Fails) -> None:
    (files.folder / "bad").mkdir()
    assert "is a directory, not a model file" in fails(3, "optimize", "bad")


def test_an_onnx_file(files: Files, fails: Fails) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    other = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [other])
    onnx.save(helper.make_model(graph), files.folder / "bad")
    assert "graphopt starts from PyTorch" in fails(3, "optimize", "bad")


def test_a_state_dict_without_a_factory(files: Files, fails: Fails) -> None:
    torch.save(small_net().state_dict(), files.folder / "bad")
    assert "--factory package.module:function" in fails(3, "optimize", "bad")


def test_an_untrusted_pickle_names_both_ways_forward(files: Files, fails: Fails) -> None:
    class Own(torch.nn.Module):
        pass

    globals()["Own"] = Own
    Own.__qualname__ = "Own"
    torch.save(Own(), files.folder / "bad")
    said = fails(3, "optimize", "bad")
    assert "--factory" in said
    assert "--trust" in said


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"inputs": np.zeros((4, 3, 8, 8), np.float32)}, "`input`"),
        ({"input": np.zeros((4, 3, 8), np.float32)}, "input"),
        ({"input": np.zeros((4, 3, 8, 8), np.int64)}, "int64"),
        ({"input": np.full((4, 3, 8, 8), np.nan, np.float32)}, "nan"),
        ({"input": np.zeros((4, 1, 8, 8), np.float32)}, "input"),
    ],
)
def test_data_that_does_not_fit(files: Files, fails: Fails, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(files.folder / "bad.npz", **arrays)
    said = fails(6, "optimize", "model.pt", "--passes", "int8", "--data", "bad.npz")
    assert message in said.lower() or message in said
    (files.folder / "bad.npz").unlink()
    assert leftovers(files.folder) == []


def test_missing_data_says_what_it_is_for(files: Files, fails: Fails) -> None:
    assert "--data samples.npz" in fails(6, "optimize", "model.pt", "--passes", "int8")


def test_data_that_is_not_there(files: Files, fails: Fails) -> None:
    fails(6, "optimize", "model.pt", "--passes", "int8", "--data", "nothing.npz")


@pytest.mark.parametrize("option", ["--data", "--eval"])
def test_data_that_is_no_file(files: Files, fails: Fails, option: str) -> None:
    os.mkfifo(files.folder / "bad")
    said = fails(6, "optimize", "model.pt", "--passes", "", option, "bad")
    assert said.startswith("`bad` is no regular file, but a FIFO, a device or a broken link.")
    assert leftovers(files.folder) == []


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ("purne", "There is no pass `purne`; did you mean `prune`?"),
        ("prune:ration=0.5", "has no option `ration`; did you mean `ratio`?"),
        ("prune:ratio=1.5", "cannot take `ratio=1.5`: input should be less than 1"),
        ("int8,prune", "`int8` must come after `prune`"),
    ],
)
def test_pipelines_with_mistakes(files: Files, fails: Fails, passes: str, message: str) -> None:
    assert message in fails(2, "optimize", "model.pt", "--passes", passes)
    assert leftovers(files.folder) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "onnxruntme"), "did you mean `onnxruntime`?"),
        (("--fail-if", "drop"), "Cannot read --fail-if"),
        (("--check", "slow"), "Use 'fast' or 'full'"),
        (("--format", "xml"), "Use --format text or --format json"),
        (("--nonsense",), "No such option: --nonsense"),
        (("-o", "data.npz"), "data.npz is a file"),
        (("--dynamic", "x"), "Cannot read --dynamic x"),
        (("--dynamic", "x:1:8"), "as in tokens:1:4-8, tokens:1:4- or tokens:1:-8"),
        (("--dynamic", "x:1=rows"), "Cannot read --dynamic x:1=rows"),
        (("--dynamic", "x:1:8-4"), "--dynamic x:1:8-4 leaves the axis one size or none"),
        (("--dynamic", "x:1:-1"), "--dynamic x:1:-1 leaves the axis one size or none"),
    ],
)
def test_arguments_with_mistakes(files: Files, fails: Fails, arguments: tuple[str, ...], message: str) -> None:
    assert message in fails(2, *LOWER, *arguments)
    assert leftovers(files.folder) == []


def test_no_model_at_all(files: Files, fails: Fails) -> None:
    assert "Give the path of a model file" in fails(2, "optimize", "--passes", "fold")


def test_a_full_disk_leaves_nothing(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # Python ignores the signal that comes with it
    try:
        code = run(["optimize", "model.pt", "--passes", "", "--no-bench", "-o", "out"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert code in (2, 5)
    assert "Traceback" not in said
    assert "File too large" in said
    out = files.folder / "out"
    assert not out.exists() or list(out.iterdir()) == []


PLUGIN = """
from graphopt import NoOptions, Pass, Plan
class Odd(Pass[NoOptions, Plan]):
    name = 'odd'
    def plan(self, program, ctx): DOES
    def apply(self, program, plan): return program.copy()
"""


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("raise ValueError('boom')", "failed to plan: ValueError: boom (PLUGIN:5). Repair the pass, or leave it out."),
        ("raise SystemExit(0)", "failed to plan: SystemExit: 0 (PLUGIN:5). Repair the pass, or leave it out."),
        ("pass", "returned a NoneType from `plan` (PLUGIN:5), not a Plan. Repair the pass, or leave it out."),
    ],
)
def test_a_plugin_that_fails(files: Files, fails: Fails, does: str, said: str) -> None:
    """Not as a gate that failed does, whose code is 1."""
    plugin = files.folder / "odd.py"
    plugin.write_text(PLUGIN.replace("DOES", does))
    found = fails(4, "optimize", "model.pt", "--passes", "odd", "--plugin", plugin)
    assert found == f"Pass `odd` from {plugin} {said.replace('PLUGIN', str(plugin))}"
    plugin.unlink()
    assert leftovers(files.folder) == []


@pytest.mark.parametrize("arguments", [(), ("--depfile", "model.d")], ids=["alone", "depfile"])
def test_a_text_too_long_for_a_name(files: Files, fails: Fails, arguments: tuple[str, ...]) -> None:
    text = "x" * 300
    said = fails(6, "optimize", "model.pt", "--passes", "", "--eval", text, *arguments)
    assert said.startswith("Cannot read `xxx")
    assert leftovers(files.folder) == []


@pytest.mark.parametrize("raised", ["ValueError('boom')", "SystemExit(0)"])
def test_an_evaluation_that_fails(files: Files, fails: Fails, raised: str) -> None:
    name = f"fails_{raised[:5].lower()}"
    (files.folder / f"{name}.py").write_text(f"def score(model):\n    raise {raised}\n")
    said = fails(6, "optimize", "model.pt", "--passes", "", "--eval", f"{name}:score")
    assert said.startswith(f"The evaluation function `{name}:score` raised {raised[:5]}")


def test_a_bug_of_our_own_is_no_failed_gate(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bug(*_: object, **__: object) -> None:
        raise KeyError("one\x1b[2J\ntwo")

    monkeypatch.setattr("graphopt.capturing.load.load_with_data", bug)
    assert run(["inspect", "model.pt"]) == 4
    said = capsys.readouterr().err
    assert re.match(r"graphopt: This is a bug in graphopt: KeyError: .* \(.*test_bad_input.py:\d+\)\. Report it", said)
    assert len(said.splitlines()) == 1
    assert "\x1b" not in said


class _Full(io.StringIO):
    """A stream to a full disk: what is written waits to be flushed, or is written at once."""

    def __init__(self, *, waits: bool) -> None:
        super().__init__()
        self._waits = waits

    def write(self, text: str) -> int:
        return len(text) if self._waits else self.flush()

    def flush(self) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self) -> None:
        """Do not flush."""


@pytest.mark.parametrize(("ended", "code"), [(0, 2), (3, 3)])
def test_where_nothing_can_be_said_the_exit_code_tells(monkeypatch: pytest.MonkeyPatch, ended: int, code: int) -> None:
    discarded: list[int] = []
    monkeypatch.setattr(app, "_discard_output", lambda: discarded.append(1))
    monkeypatch.setattr(sys, "stdout", _Full(waits=True))
    monkeypatch.setattr(sys, "stderr", _Full(waits=False))

    def run(_: object) -> int:
        print("done")
        app._say("and said")
        return ended

    monkeypatch.setattr(app, "run", run)
    with pytest.raises(SystemExit) as left:
        app.main()
    assert (left.value.code, discarded) == (code, [1])


def test_a_name_of_another_alphabet_is_written_as_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    monkeypatch.setattr(app, "run", lambda _: print("asc\u7ed3") or 0)
    with pytest.raises(SystemExit) as left:
        app.main()
    assert (left.value.code, written.getvalue()) == (0, b"asc\\u7ed3\n")


def test_an_interrupt_leaves_nothing(files: Files, fails: Fails) -> None:
    plugin = files.folder / "stop.py"
    plugin.write_text(
        "import signal\n"
        "from graphopt import NoOptions, Pass, Plan\n"
        "class Stop(Pass[NoOptions, Plan]):\n"
        "    '''Press ^C.'''\n"
        "    name = 'stop'\n"
        "    def plan(self, program, ctx):\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "    def apply(self, program, plan):\n"
        "        return program\n"
    )
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
    try:
        said = fails(130, "optimize", "model.pt", "--passes", "fold,stop", "--plugin", plugin)
    finally:
        signal.signal(signal.SIGINT, before)
    assert said == "Interrupted. Nothing was left half-written."
    plugin.unlink()
    assert leftovers(files.folder) == []


def test_paths_of_apply_that_are_too_few_or_too_many(files: Files, fails: Fails) -> None:
    for given in ([], ["manifest.json"]):
        assert "`graphopt apply MODEL manifest.json`, or" in fails(2, "apply", *given, "-o", "again")
    assert "There is no m.json" in fails(2, "apply", "m.json", "--factory", "m:f", "-o", "again")
    assert "unexpected extra argument" in fails(2, "apply", "model.pt", "m.json", "more.json", "-o", "again")
