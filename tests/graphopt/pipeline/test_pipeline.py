"""Pipelines: text and TOML round-trip, options are typed, order is checked and explained, needs are inserted."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import UsageError
from graphopt.pipeline.options import describe
from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.registry import PassRegistry
from tests.graphopt.toy_passes import NeedsReady, Prepare, Random, Scale, ScaleOptions

REGISTRY = PassRegistry([Scale, Random, Prepare, NeedsReady])


def parse(text: str) -> Pipeline:
    return Pipeline.parse(text, REGISTRY)


def test_text_builds_typed_options() -> None:
    (step,) = parse("scale:factor=0.5:times=3:mode=first:skip=a.weight+b.*:limit=4:dry=yes").steps
    assert step.instance.options == ScaleOptions(0.5, 3, "first", ("a.weight", "b.*"), 4, True)


@given(
    st.builds(
        ScaleOptions,
        factor=st.floats(0.01, 2),
        times=st.integers(1, 9),
        mode=st.sampled_from(["all", "first"]),
        skip=st.lists(st.from_regex(r"[a-z_.*]{1,8}", fullmatch=True), max_size=3).map(tuple),
        limit=st.none() | st.integers(-5, 5),
        dry=st.booleans(),
    )
)
def test_text_and_toml_round_trip(options: ScaleOptions) -> None:
    pipeline = Pipeline.parse([Scale(options), Random()], REGISTRY)
    again = parse(pipeline.text)
    assert [step.instance.options for step in again.steps] == [step.instance.options for step in pipeline.steps]
    assert again.text == pipeline.text


@pytest.mark.parametrize("text", ["", "random", "scale:factor=0.5:skip=a+b,random", "scale:limit=3:dry=yes"])
def test_toml_round_trip(text: str, tmp_path: Path) -> None:
    file = tmp_path / "passes.toml"
    file.write_text(parse(text).to_toml() or "pass = []")
    assert Pipeline.from_toml(file, REGISTRY).text == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scal", r"There is no pass `scal`; did you mean `scale`\?.*--plugin FILE"),
        ("scale:facto=1", r"has no option `facto`; did you mean `factor`\? Its options: factor, times"),
        ("scale:factor=3", r"cannot take `factor=3`: input should be less than or equal to 2"),
        ("scale:factor=big", r"cannot take `factor=big`: input should be a valid number"),
        ("scale:mode=last", r"cannot take `mode=last`: input should be 'all' or 'first'"),
        ("scale:factor", r"Cannot read `factor` in `scale:factor`. Write options as name:option=value"),
        ("scale:times=1:times=2", r"`times` is given twice"),
        (
            "needs_ready,random",
            r"Passes `needs_ready` \(class .* and `random` .* cannot be in one pipeline",
        ),
        ("needs_ready,scale", r"`needs_ready` .* must come after `scale`.*Write --passes scale,needs_ready\."),
    ],
)
def test_mistakes_are_explained(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(text)


def test_a_missing_need_is_inserted_and_shown() -> None:
    pipeline = parse("scale:factor=0.5,needs_ready")
    assert [step.name for step in pipeline.steps] == ["scale", "prepare", "needs_ready"]
    assert str(pipeline) == "scale:factor=0.5 -> prepare (needed by needs_ready) -> needs_ready"
    assert pipeline.text == "scale:factor=0.5,needs_ready"


def test_a_met_need_is_not_inserted_again() -> None:
    assert [step.name for step in parse("prepare,needs_ready").steps] == ["prepare", "needs_ready"]


def test_a_need_that_nobody_meets() -> None:
    with pytest.raises(UsageError, match="needs a program that is `ready`, and no installed pass makes it so"):
        Pipeline.parse([NeedsReady], PassRegistry([NeedsReady]))


def test_fork_is_at_the_first_pass_that_reads_the_target() -> None:
    assert parse("scale,prepare,needs_ready").fork() == 2
    assert parse("scale,random").fork() == 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[tool]\n", "`pass` is missing"),
        (b"", "`pass` is missing"),
        (b"[pass]\nname = 'scale'\n", "`pass` is missing, or no list of tables"),
        (b"pass = 3\n", "no list of tables"),
        (b"pass = [3]\n", "no list of tables"),
        (b"[[pass]]\nfactor = 0.5\n", "Pass 1 of .* has no `name`"),
        (b"[[pass]]\nname = 3\n", "Pass 1 of .* has no `name`"),
        (b"[[pass]]\nname = 'scale'\n[[pas]]\nname = 'random'\n", "holds `pas` beside its passes"),
        (b"[[pass]]\nname = 'scale'\nfactor = {a = 1}\n", "`scale` cannot take `factor=.*`"),
        (b"[[pass]]\nname = 'scale'\nlimit = 1979-05-27\n", "`scale` cannot take `limit=.*`"),
        (b"[[pass]]\nname = 'scale'\nfactor = nan\n", "`scale` cannot take `factor=nan`"),
        (b"[[pass]]\nname = 'scale'\nskip = [[['a']]]\n", "`scale` cannot take `skip=.*`"),
        (b"[[pass]]\nname = 'scale'\ntimes = " + b"9" * 5000, "is not a pipeline: "),
        (b"pass = " + b"[" * 5000, "is not a pipeline: "),
        ("[[pass]]\nname = 'é'\n".encode("latin1"), "is not a pipeline: .*utf-8"),
        (bytes(range(256)), "is not a pipeline: "),
        (b" " * (1 << 21), "is not a pipeline: it has more than the 1,048,576 bytes"),
    ],
)
def test_not_a_pipeline_file(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "x.toml"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=reason):
        Pipeline.from_toml(file, REGISTRY)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (os.mkfifo, "it is a FIFO, not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a device, not a regular file"),
        (Path.mkdir, "Is a directory"),
        (lambda path: None, "No such file"),
    ],
)
def test_not_even_a_file(tmp_path: Path, make: Callable[[Path], object], reason: str) -> None:
    make(tmp_path / "x.toml")
    with pytest.raises(UsageError, match=reason):
        Pipeline.from_toml(tmp_path / "x.toml", REGISTRY)


def test_help_comes_from_the_options_alone() -> None:
    rows = {name: (kind, default, allowed) for name, kind, default, allowed in describe(ScaleOptions)}
    assert rows["factor"] == ("number", "1.0", "> 0, <= 2")
    assert rows["mode"][2] == "all | first"
    assert rows["limit"] == ("integer or null", "none", "")
