"""Orders and needs: what is accepted, what is inserted, and what is said, against brute force over random passes."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.cli.app import run
from graphopt.errors import UsageError
from graphopt.ir.program import Program
from graphopt.pipeline import registry
from graphopt.pipeline.context import Context
from graphopt.pipeline.pass_base import NoOptions, Pass
from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.plan import Plan
from graphopt.pipeline.registry import PassRegistry

NAMES = "abcde"
PROPERTIES = "xyz"
Kind = type[Pass[NoOptions, Plan]]


class Toy(Pass[NoOptions, Plan]):
    """Does nothing."""

    def plan(self, program: Program, ctx: Context) -> Plan:
        """Find nothing."""
        return self.new_plan(sites=())

    def apply(self, program: Program, plan: Plan) -> Program:
        """Change nothing."""
        return program.copy()


def toy(name: str, **constraints: Sequence[str]) -> Kind:
    return type(name, (Toy,), {"name": name, **{word: tuple(given) for word, given in constraints.items()}})


def known(kinds: Sequence[Kind]) -> PassRegistry:
    """Return a registry of these passes alone."""
    with mock.patch.object(registry, "entry_points", return_value=[]):
        return PassRegistry(kinds)


def fails(kinds: Sequence[Kind], text: str) -> str:
    with pytest.raises(UsageError) as caught:
        Pipeline.parse(text, known(kinds))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(text: str, kinds: Sequence[Kind]) -> list[str]:
    return [step.name for step in Pipeline.parse(text, known(kinds)).steps]


A_BEFORE_B = [toy("a", before="b"), toy("b")]


def test_a_pass_may_stand_before_one_that_does_not_know_it() -> None:
    assert names("a,b", A_BEFORE_B) == ["a", "b"]
    said = fails(A_BEFORE_B, "b,a")
    assert said == "Pass `a` (class `a`) must come before `b` (class `b`). Write --passes a,b."


def test_a_plugin_before_int8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from graphopt import NoOptions, Pass, Plan\n"
        "class Mine(Pass[NoOptions, Plan]):\n"
        "    '''Stand before int8, and add BatchNorm.'''\n"
        "    name = 'mine'\n"
        "    before = ('int8',)\n"
        "    invalidates = ('folded',)\n"
        "    def plan(self, program, ctx):\n"
        "        return self.new_plan(sites=[])\n"
        "    def apply(self, program, plan):\n"
        "        return program\n"
    )
    found = PassRegistry([file])
    with pytest.raises(UsageError) as caught:
        Pipeline.parse("prune,int8,mine", found)
    assert str(caught.value) == f"Pass `mine` (file {file}) must come before `int8`. Write --passes prune,mine,int8."
    pipeline = Pipeline.parse("fold,mine,int8", found)
    assert str(pipeline) == "fold -> mine -> fold (needed by int8) -> int8"
    assert Pipeline.parse(pipeline.text, found).text == pipeline.text == "fold,mine,int8"
    assert run(["passes", "show", "mine", "--plugin", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "invalidates: folded" in shown
    assert "before: int8" in shown


def test_plugins_that_contradict_each_other() -> None:
    said = fails([toy("a", before="b"), toy("b", before="a")], "a,b")
    assert said == (
        "No order of these passes is right: `a` (class `a`) must come before `b` (class `b`), `b` (class `b`) must "
        "come before `a` (class `a`). Leave one of them out."
    )


def test_a_circle_of_three() -> None:
    kinds = [toy("a", before="b"), toy("b", before="c"), toy("c", before="a"), toy("d")]
    assert len(re.findall("must come before", fails(kinds, "d,a,b,c"))) == 3
    assert names("d,a,b", kinds) == ["d", "a", "b"]


def test_a_pass_that_may_stand_once() -> None:
    kinds = [toy("a", after="a"), toy("b", conflicts="b"), toy("c")]
    assert names("a,b,c,c", kinds) == ["a", "b", "c", "c"]
    assert "No order of these passes is right: `a`" in fails(kinds, "a,c,a")
    assert "cannot be in one pipeline" in fails(kinds, "b,c,b")


def test_a_property_that_is_undone_is_made_again() -> None:
    kinds = [toy("make", produces="x"), toy("undo", invalidates="x"), toy("user", needs="x")]
    assert names("make,undo,user", kinds) == ["make", "undo", "make", "user"]
    assert names("user,user,undo,user", kinds) == ["make", "user", "user", "undo", "make", "user"]
    assert names("undo,user", kinds) == ["undo", "make", "user"]


def test_what_is_inserted_is_made_in_an_order_that_keeps_it() -> None:
    kinds = [toy("a", produces="x"), toy("b", produces="y", invalidates="x"), toy("c", needs="xy")]
    assert names("c", kinds) == ["b", "a", "c"]
    deep = [toy("a", produces="x", needs="y"), toy("b", produces="y"), toy("c", needs="x")]
    assert str(Pipeline.parse("c", known(deep))) == "b (needed by a) -> a (needed by c) -> c"


@pytest.mark.parametrize(
    ("kinds", "text", "said"),
    [
        (
            [toy("a", produces="x", invalidates="y"), toy("b", produces="y", invalidates="x"), toy("c", needs="xy")],
            "c",
            "Pass `c` needs a program that is `x` and `y`, which no sequence of passes makes: "
            "`a` makes `x` and undoes `y`; `b` makes `y` and undoes `x`.",
        ),
        (
            [toy("a", produces="x", needs="y"), toy("b", produces="y", needs="x"), toy("c", needs="x")],
            "c",
            "Pass `c` needs a program that is `x`, which no sequence of passes makes: "
            "`a` makes `x` and needs `y`; `b` makes `y` and needs `x`.",
        ),
        (
            [toy("a", invalidates="x"), toy("c", needs="x")],
            "a,c",
            "Pass `c` needs a program that is `x`, and no installed pass makes it so after `a`, which undoes it.",
        ),
        (
            [toy("a", produces="x", invalidates="x")],
            "a",
            "Pass `a` says that it both produces and invalidates `x`. Repair it.",
        ),
    ],
)
def test_needs_that_cannot_be_met(kinds: list[Kind], text: str, said: str) -> None:
    assert fails(kinds, text) == said


def test_an_inserted_pass_in_a_wrong_place_is_written_where_it_is_right() -> None:
    kinds = [toy("fold", produces="x", before="a"), toy("a"), toy("b", needs="x")]
    said = fails(kinds, "a,b")
    assert said == (
        "Pass `fold` (class `fold`, inserted for `b`) must come before `a` (class `a`). Write --passes fold,a,b."
    )
    assert names("fold,a,b", kinds) == ["fold", "a", "b"]


def test_an_inserted_pass_that_fits_nowhere() -> None:
    kinds = [toy("fold", produces="x", before="a"), toy("a", invalidates="x"), toy("b", needs="x", after="a")]
    said = fails(kinds, "a,b")
    assert "`fold` (class `fold`, inserted for `b`) must come before `a`" in said
    assert said.endswith("Leave one of them out.")


@st.composite
def universes(draw: st.DrawFn) -> tuple[list[Kind], list[str]]:
    """Draw passes that say things of each other, and a pipeline of some of them."""
    some, few = st.sets(st.sampled_from(NAMES), max_size=2), st.sets(st.sampled_from(PROPERTIES), max_size=1)
    kinds = []
    for name in NAMES:
        needs, produces = draw(st.sets(st.sampled_from(PROPERTIES), max_size=2)), draw(few)
        kinds.append(
            toy(
                name,
                after=sorted(draw(some)),
                before=sorted(draw(some)) if draw(st.booleans()) else (),
                conflicts=sorted(draw(some)) if draw(st.integers(0, 4)) == 0 else (),
                needs=sorted(needs) if draw(st.booleans()) else (),
                produces=sorted(produces),
                invalidates=sorted(draw(few) - produces),
            )
        )
    return kinds, draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4))


def right(order: Sequence[Kind]) -> bool:
    """Tell whether a sequence of passes is what all of them ask for."""
    holds: set[str] = set()
    for index, kind in enumerate(order):
        others = [other.name for other in (*order[:index], *order[index + 1 :])]
        wrong = set(kind.conflicts) & set(others)
        wrong |= set(kind.after) & {other.name for other in order[index + 1 :]}
        wrong |= set(kind.before) & {other.name for other in order[:index]}
        if wrong or not holds.issuperset(kind.needs):
            return False
        holds = (holds - set(kind.invalidates)) | set(kind.produces)
    return True


def supplemented(written: Sequence[Kind], kinds: Sequence[Kind], most: int) -> Iterator[list[Kind]]:
    """Yield what is written with up to so many producers before each pass."""
    first_of = (next((kind for kind in kinds if prop in kind.produces), None) for prop in PROPERTIES)
    producers = sorted({kind for kind in first_of if kind is not None}, key=lambda kind: kind.name)
    few = [list(chosen) for count in range(most + 1) for chosen in itertools.product(producers, repeat=count)]
    for choice in itertools.product(few, repeat=len(written)):
        yield [kind for chosen, own in zip(choice, written, strict=True) for kind in (*chosen, own)]


def parsed(text: str, found: PassRegistry) -> Pipeline | str:
    """Return a pipeline, or why it is none."""
    try:
        return Pipeline.parse(text, found)
    except UsageError as err:
        return str(err)


@settings(max_examples=100, deadline=None)
@given(universes())
def test_what_is_accepted_is_right_and_what_is_refused_is_not(drawn: tuple[list[Kind], list[str]]) -> None:
    kinds, text = drawn
    by_name, found = {kind.name: kind for kind in kinds}, known(kinds)
    written = [by_name[name] for name in text]
    pipeline = parsed(",".join(text), found)
    if right(written):
        assert not isinstance(pipeline, str), pipeline
        assert [type(step.instance) for step in pipeline.steps] == written
    if isinstance(pipeline, str):
        _check_advice(pipeline, written, kinds, found)
        if len(written) == 1:
            assert not any(map(right, supplemented(written, kinds, most=3))), pipeline
        return
    steps = [type(step.instance) for step in pipeline.steps]
    assert right(steps)
    assert [step.name for step in pipeline.steps if not step.inserted_for] == text
    assert pipeline.text == ",".join(text)
    for count in range(len(steps)):
        for fewer in itertools.combinations(steps, count):
            bare = [kind for kind in fewer if kind in written]
            assert len(written) > 1 or bare != written or not right(fewer), "something is inserted that nobody needs"


@settings(max_examples=100, deadline=None)
@given(universes())
def test_without_needs_an_order_is_advised_wherever_there_is_one(drawn: tuple[list[Kind], list[str]]) -> None:
    kinds = [toy(k.name, after=k.after, before=k.before, conflicts=k.conflicts) for k in drawn[0]]
    by_name, found = {kind.name: kind for kind in kinds}, known(kinds)
    written = [by_name[name] for name in drawn[1]]
    pipeline = parsed(",".join(drawn[1]), found)
    assert isinstance(pipeline, Pipeline) is right(written)
    if isinstance(pipeline, str):
        _check_advice(pipeline, written, kinds, found)
        possible = any(map(right, itertools.permutations(written)))
        assert ("Write --passes" in pipeline) is possible


def _check_advice(said: str, written: Sequence[Kind], kinds: Sequence[Kind], found: PassRegistry) -> None:
    """Check that an order which is advised is right, and that where there is none no order of the passes is."""
    advised = re.search(r"Write --passes ([a-z,]+)\.", said)
    if advised:
        assert Pipeline.parse(advised[1], found).text == advised[1]
        assert Counter(advised[1].split(",")) >= Counter(kind.name for kind in written)
    elif said.startswith("No order of these passes is right"):
        pairs = re.findall(r"`(\w)` \([^)]*\) must come before `(\w)`", said)
        by_name = {kind.name: kind for kind in kinds}
        assert pairs
        for (first, second), (following, _) in zip(pairs, [*pairs[1:], pairs[0]], strict=True):
            assert second in by_name[first].before or first in by_name[second].after
            assert second == following
    if said.startswith("No order") or said.endswith("Leave one of them out."):
        for order in itertools.permutations(written):
            if right(order):
                raise AssertionError(f"{[kind.name for kind in order]} is right: {said}")


def test_an_order_that_needs_no_insertion_is_found() -> None:
    kinds = [toy("a", produces="x", after="b"), toy("b", needs="x"), toy("c", produces="x")]
    assert names("c,b", kinds) == ["c", "b"]
    assert "Write --passes c,b." in fails(kinds, "b,c")
