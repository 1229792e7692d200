"""Plugins that raise, or return what they must not: one sentence names pass, file and line, and the exit code is 4."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from graphopt.capturing.capture import capture
from graphopt.errors import DataError, PassError, UsageError
from graphopt.ir.program import Program
from graphopt.pipeline.context import Context
from graphopt.pipeline.hooks import FullCheck
from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.registry import PassRegistry
from graphopt.pipeline.runner import apply, run

PLUGIN = """
import dataclasses
from graphopt import NoOptions, Pass, Plan
from graphopt.errors import DataError
class Stop(BaseException): pass
class Interrupt(KeyboardInterrupt): pass
@dataclasses.dataclass(frozen=True)
class Options:
    word: str = ""
    def __post_init__(self): OPTIONS
class Odd(Pass[Options, Plan]):
    name = NAME
    options_type = Options
    def plan(self, program, ctx): PLAN
    def apply(self, program, plan): APPLY
    def prove(self, before, after, plan): PROVE
"""
PLAN_LINE, APPLY_LINE, PROVE_LINE = 14, 15, 16
HONEST = {
    "NAME": "'odd'",
    "OPTIONS": "pass",
    "PLAN": "return self.new_plan(sites=['a'])",
    "APPLY": "return program.copy()",
    "PROVE": "pass",
}


@pytest.fixture(scope="module")
def program() -> Program:
    return capture(nn.Linear(4, 3), torch.randn(2, 4))


def plugin(folder: Path, **parts: str) -> Path:
    text = PLUGIN
    for name, part in {**HONEST, **parts}.items():
        text = text.replace(f" {name}\n", f" {part}\n")
    (folder / "odd.py").write_text(text)
    return folder / "odd.py"


def said(file: Path, program: Program, kind: type[Exception] = PassError) -> str:
    """Run the plugin, which must fail; return the one line it fails with."""
    with pytest.raises(kind) as caught:
        run(Pipeline.parse("odd:word=x", PassRegistry([file])), program, Context(program), [FullCheck()])
    assert type(caught.value) is kind
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("raises", "shown"),
    [
        ("raise ValueError('boom\\nbang')", "ValueError: boom"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("raise Stop", "Stop"),
        ("raise Interrupt('now')", "Interrupt: now"),
        ("raise GeneratorExit", "GeneratorExit"),
        ("assert False", "AssertionError"),
        ("raise FileNotFoundError(2, 'gone')", "FileNotFoundError: .Errno 2. gone"),
        ("raise BrokenPipeError(32, 'a worker died')", "BrokenPipeError: .Errno 32. a worker died"),
        ("next(iter(()))", "StopIteration"),
        ("return self.plan(program, ctx)", "RecursionError: maximum recursion depth exceeded"),
        ("program.call_flat((1,))", "\\w+Error: "),
    ],
)
def test_a_plugin_that_raises(raises: str, shown: str, program: Program, tmp_path: Path) -> None:
    file = plugin(tmp_path, PLAN=raises)
    place = re.escape(str(file))
    found = said(file, program)
    expected = rf"failed to plan: {shown}.* \({place}:{PLAN_LINE}\)\. Repair the pass, or leave it out\."
    assert re.fullmatch(f"Pass `odd` from {place} {expected}", found), found


@pytest.mark.parametrize(
    ("part", "line", "deed"), [("APPLY", APPLY_LINE, "apply its plan"), ("PROVE", PROVE_LINE, "prove what it did")]
)
def test_a_plugin_that_raises_later(part: str, line: int, deed: str, program: Program, tmp_path: Path) -> None:
    honest = {} if part == "APPLY" else {"APPLY": "p = program.copy(); return p.with_graph(p.graph_module)"}
    file = plugin(tmp_path, **honest, **{part: "1 / 0"})
    assert f"failed to {deed}: ZeroDivisionError: division by zero ({file}:{line})" in said(file, program)


def test_what_a_pass_of_our_own_raises_is_a_bug(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    fold = PassRegistry().pass_class("fold")

    def bug(*_: object) -> None:
        raise KeyError("of ours")

    monkeypatch.setattr(fold, "plan", bug)
    monkeypatch.setattr(fold, "apply", bug)
    pipeline, context, plan = Pipeline.parse("fold", PassRegistry()), Context(program), fold().new_plan(sites=["a"])
    with pytest.raises(KeyError, match="of ours"):
        run(pipeline, program, context)
    with pytest.raises(KeyError, match="of ours"):
        apply(fold(), program, plan)
    with pytest.raises(PassError, match="failed to apply its plan: KeyError"):  # a file may hold any plan
        apply(fold(), program, plan, stored=lambda made: made)


def test_what_a_pass_raises_on_purpose_stays(program: Program, tmp_path: Path) -> None:
    assert said(plugin(tmp_path, PLAN="raise DataError('no labels')"), program, DataError) == "no labels"


@pytest.mark.parametrize(
    ("parts", "shown"),
    [
        ({"PLAN": "pass"}, rf"returned a NoneType from `plan` \(.*odd.py:{PLAN_LINE}\), not a Plan"),
        ({"PLAN": "return {}"}, rf"returned a dict from `plan` \(.*odd.py:{PLAN_LINE}\), not a Plan"),
        ({"PLAN": "return Plan"}, r"returned a type from `plan`"),
        ({"PLAN": "return self.new_plan(sites=[1])"}, "planned with a int in `sites`, where each is a str"),
        (
            {"PLAN": "return self.new_plan(sites='a', refusals=['b'])"},
            "planned with a str in `refusals`, where each is a Refusal",
        ),
        (
            {"PLAN": "return self.new_plan(sites='a', tensors={'w': 1})"},
            "planned with a int in `tensors`, where each is a Tensor",
        ),
        ({"PLAN": "return self.new_plan(sites='a', tensors=[])"}, "planned with a list in `tensors`"),
        ({"PLAN": "return self.new_plan(sites=None)"}, rf"failed to plan: TypeError: .*\(.*odd.py:{PLAN_LINE}\)"),
        ({"APPLY": "pass"}, rf"returned a NoneType from `apply` \(.*odd.py:{APPLY_LINE}\), not a Program"),
        ({"APPLY": "return program.graph_module"}, r"returned a .*Module from `apply`"),
        ({"OPTIONS": "1 / 0"}, r"failed to take its options: ZeroDivisionError"),
    ],
)
def test_a_plugin_that_returns_or_takes_something_else(
    parts: dict[str, str], shown: str, program: Program, tmp_path: Path
) -> None:
    file = plugin(tmp_path, **parts)
    found = said(file, program)
    assert found.startswith(f"Pass `odd` from {file} ")
    assert re.search(shown, found), found


@pytest.mark.parametrize("name", ["3", "''", "'a,b'", "'a:b'", "None", "'\\x1b[2J'"])
def test_a_pass_that_no_pipeline_could_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"The pass `Odd` of the plugin .*odd.py is called .*letters, digits"):
        PassRegistry([plugin(tmp_path, NAME=name)])
