"""Finding plugins: entry points, files, classes; a broken one breaks nothing; clashes name both."""

from __future__ import annotations

import logging
import pickle
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from graphopt.axes.registry import _RULES, built_in_rules
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


def test_two_files_of_one_stem(tmp_path: Path) -> None:
    files = []
    for folder, name in (("one", "first"), ("two", "second")):
        (tmp_path / folder).mkdir()
        files.append(tmp_path / folder / "my_pass.py")
        files[-1].write_text(PLUGIN.replace('"nothing"', f'"{name}"'))
    found = PassRegistry(files)
    for name in ("first", "second"):
        kind = found.pass_class(name)
        assert kind.name == name
        assert pickle.loads(pickle.dumps(kind)) is kind


def test_a_file_given_twice_is_one_plugin(tmp_path: Path) -> None:
    file = tmp_path / "my_pass.py"
    file.write_text(PLUGIN)
    kind = PassRegistry([file, str(file)]).pass_class("nothing")
    assert PassRegistry([file]).pass_class("nothing") is kind


def test_a_plugin_called_like_a_built_in_pass(tmp_path: Path) -> None:
    file = tmp_path / "other.py"
    file.write_text(PLUGIN.replace('"nothing"', '"prune"'))
    with pytest.raises(UsageError, match=r"are called `prune`: distribution `graphopt` and file .*other.py"):
        PassRegistry([file])


def test_a_file_of_axis_rules_alone(tmp_path: Path) -> None:
    file = tmp_path / "rules.py"
    file.write_text(
        "from graphopt.axes.registry import rule\n"
        "@rule('a_library::scale_channels')\n"
        "def scale_channels(call):\n"
        "    return call.dims('x')\n"
    )
    try:
        PassRegistry([file])
        assert "a_library::scale_channels" in built_in_rules()
    finally:
        _RULES.pop("a_library::scale_channels", None)


def test_a_broken_entry_point_breaks_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    broken = EntryPoint("broken", "no_such_module:Thing", registry.PASSES)
    monkeypatch.setattr(registry, "entry_points", lambda group: [broken])
    found = PassRegistry([Scale])
    with caplog.at_level(logging.WARNING):
        assert found.working(Pass) == {"scale": Scale}
        assert found.producer_of("what nobody makes") is None
        assert found.working(Pass) == {"scale": Scale}
    assert caplog.text.count("`broken` from an unknown distribution cannot be imported") == 1
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
    known = "onnxruntime, onnxruntime-arm, onnxruntime-x86-avx2, tensorrt"
    said = rf"There is no target `onnxruntime:cuda`.* Known: {known}\."
    with pytest.raises(UsageError, match=said):
        registry.backends_named("onnxruntime:cuda")
    (found,) = registry.backends_named("onnxruntime:x86-avx2")
    assert found.name == "onnxruntime-x86-avx2"
