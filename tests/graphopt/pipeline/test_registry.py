"""Finding plugins: entry points, files, classes; a broken one breaks nothing; clashes name both."""

from __future__ import annotations

import logging
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from graphopt.errors import UsageError
from graphopt.pipeline import registry
from graphopt.pipeline.pass_base import Pass
from graphopt.pipeline.registry import PassRegistry
from tests.graphopt.toy_passes import Scale

PLUGIN = """
from graphopt import NoOptions, Pass, Plan

class Nothing(Pass[NoOptions, Plan]):
    '''Do nothing.'''
    name = "nothing"
    def plan(self, program, ctx):
        return self.new_plan(sites=[])
    def apply(self, program, plan):
        return program.copy()
"""


def test_a_file_is_a_plugin(tmp_path: Path) -> None:
    file = tmp_path / "my_pass.py"
    file.write_text(PLUGIN)
    found = PassRegistry([file])
    assert found.pass_class("nothing").name == "nothing"
    assert found.source("nothing") == f"file {file}"


def test_a_class_is_a_plugin() -> None:
    assert PassRegistry([Scale]).pass_class("scale") is Scale


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise ValueError('boom')", r"my_pass.py cannot be imported: ValueError: boom"),
        ("x = 1", r"my_pass.py defines no pass"),
        ("def broken(:", r"cannot be imported: SyntaxError"),
    ],
)
def test_a_broken_file_says_what_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "my_pass.py"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        PassRegistry([file])


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        PassRegistry([tmp_path / "none.py"])


def test_two_passes_of_one_name(tmp_path: Path) -> None:
    file = tmp_path / "other.py"
    file.write_text(PLUGIN.replace('"nothing"', '"scale"'))
    with pytest.raises(UsageError, match=r"Two plugins are called `scale`: class `Scale` and file .*other.py"):
        PassRegistry([Scale, file])


def test_a_broken_entry_point_breaks_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    broken = EntryPoint("broken", "no_such_module:Thing", registry.PASSES)
    monkeypatch.setattr(registry, "entry_points", lambda group: [broken])
    found = PassRegistry([Scale])
    with caplog.at_level(logging.WARNING):
        assert found.working(Pass) == {"scale": Scale}
    assert "`broken` from an unknown distribution cannot be imported" in caplog.text
    with pytest.raises(UsageError, match="No module named 'no_such_module'"):
        found.pass_class("broken")


def test_an_entry_point_that_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = EntryPoint("wrong", "json:dumps", registry.PASSES)
    monkeypatch.setattr(registry, "entry_points", lambda group: [wrong])
    with pytest.raises(UsageError, match="not a subclass of Pass"):
        PassRegistry().pass_class("wrong")


def test_an_unknown_target() -> None:
    with pytest.raises(UsageError, match=r"There is no target `onnxruntim`; did you mean `onnxruntime`\?"):
        registry.backend("onnxruntim")
