"""Pipelines: text and TOML round-trip, options are typed, order is checked and explained, needs are inserted."""

from __future__ import annotations

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
        ("scal", r"There is no pass `scal`; did you mean `scale`\?"),
        ("scale:facto=1", r"has no option `facto`; did you mean `factor`\? Its options: factor, times"),
        ("scale:factor=3", r"cannot take `factor=3`: Input should be less than or equal to 2"),
        ("scale:factor=big", r"cannot take `factor=big`: Input should be a valid number"),
        ("scale:mode=last", r"cannot take `mode=last`: Input should be 'all' or 'first'"),
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


def test_not_a_pipeline_file(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text("[tool]\n")
    with pytest.raises(UsageError, match=r"is not a pipeline.*one \[\[pass\]\] table per pass"):
        Pipeline.from_toml(file, REGISTRY)


def test_help_comes_from_the_options_alone() -> None:
    rows = {name: (kind, default, allowed) for name, kind, default, allowed in describe(ScaleOptions)}
    assert rows["factor"] == ("number", "1.0", "> 0, <= 2")
    assert rows["mode"][2] == "all | first"
    assert rows["limit"] == ("integer or null", "none", "")
