"""Paired latency measurement: what is measured, in which order, on which options."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from graphopt.errors import UsageError
from graphopt.ir.signature import TensorSpec
from graphopt.measure import bench
from graphopt.measure.bench import Comparison, Spread, TimedPair, Timing, batch_of, compare, in_turn, time_in_turn
from graphopt.targets.backend import Artifact

IMAGE = TensorSpec("x", ("batch", 3), torch.float32)
IDS = TensorSpec("ids", ("batch", "length"), torch.int64)


class FakeBackend:
    """Hands out sessions that remember what they were asked for."""

    def __init__(self) -> None:
        self.sessions: list[tuple[str, dict[str, object], int]] = []

    def session(self, artifact: Artifact, **options: object) -> object:
        def run(*inputs: np.ndarray) -> tuple[np.ndarray, ...]:
            self.sessions.append((artifact.path.name, {**artifact.session_options, **options}, len(inputs[0])))
            _spin(0.004 if artifact.path.name == "slow" else 0.001)
            return inputs

        return run


def artifact(backend: FakeBackend, name: str, inputs: tuple[TensorSpec, ...] = (IMAGE,)) -> Artifact:
    return Artifact(Path(name), (), backend, inputs, (), {"level": "all"})  # type: ignore[arg-type]


class _Clock:
    """A processor that half of the time others have."""

    now = 0.0

    def process_time(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return 2 * self.now


_CLOCK = _Clock()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "time", _CLOCK)


def _spin(seconds: float) -> None:
    """Take some of the processor's time."""
    _CLOCK.now += seconds


def test_ratio_of_cpu_times() -> None:
    backend = FakeBackend()
    found = compare(artifact(backend, "slow"), artifact(backend, "fast"), seconds=0.1)
    for pair in (found.recorded, found.plain):
        assert pair.rounds >= 7
        assert pair.cpu_ratio.median == pytest.approx(4.0)
        assert pair.first.cpu.minimum == pytest.approx(4.0)
        assert pair.second.wall.minimum == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("wall", "cpu", "disturbed"),
    [
        ([1.9, 2.0, 2.1], 2.0, False),
        ([1.99, 2.0, 2.01], 2.15, False),
        ([1.0, 2.0, 3.4], 2.0, True),
        ([0.6, 0.67, 0.74], 1.9, True),
        ([1.0], 1.0, False),
    ],
)
def test_a_ratio_that_says_nothing_is_doubted(wall: list[float], cpu: float, disturbed: bool) -> None:
    timing = Timing(Spread.of([1.0]), Spread.of([1.0]))
    pair = TimedPair(timing, timing, Spread.of(wall), Spread.of([cpu]), len(wall))
    assert pair.disturbed is disturbed
    assert bool(Comparison(pair, pair, 1, 1).doubts()) is disturbed
    assert Comparison(pair, pair, 2, 1).doubts() == []  # processor time is that of all threads


def test_recorded_and_plain_options_get_the_same_treatment() -> None:
    backend = FakeBackend()
    compare(artifact(backend, "slow"), artifact(backend, "fast"), batch=2, threads=3, seconds=0.01)
    asked = {(name, tuple(options.items()), size) for name, options, size in backend.sessions}
    recorded, plain = (("level", "all"), ("threads", 3)), (("threads", 3),)
    assert asked == {(name, options, 2) for name in ("slow", "fast") for options in (recorded, plain)}


def test_an_artifact_is_not_timed_against_itself() -> None:
    """That would say it is 1.02 times as fast, or 0.97 times, and take twice as long."""
    backend = FakeBackend()
    one = artifact(backend, "fast")
    found = compare(one, one, seconds=0)
    for pair in (found.recorded, found.plain):
        assert pair.wall_ratio == pair.cpu_ratio == Spread.of([1.0])
        assert pair.first == pair.second
        assert pair.first.wall.minimum == pytest.approx(2.0)
    calls = 3 + 1 + 2 * 7  # warm-up, an estimate, seven rounds of two milliseconds
    assert len(backend.sessions) <= 2 * calls


def test_artifacts_with_other_inputs_are_refused() -> None:
    backend = FakeBackend()
    with pytest.raises(UsageError, match="Only artifacts with the same inputs"):
        compare(artifact(backend, "one"), artifact(backend, "other", (IDS,)))
    with pytest.raises(UsageError, match=r"^a/same takes x.*; b/same takes ids"):
        compare(artifact(backend, "runs/a/same"), artifact(backend, "runs/b/same", (IDS,)))


def test_who_goes_first_alternates() -> None:
    order: list[str] = []

    def call(name: str) -> None:
        order.append(name)
        _spin(0.003)

    found = time_in_turn(lambda: call("a"), lambda: call("b"), seconds=0)
    assert found.rounds == 7
    assert order[8:] == ["a", "b", "b", "a"] * 3 + ["a", "b"]  # 3 warm-up calls and a burst estimate each come first


def test_short_calls_are_repeated_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, clock = [0], [0.0]
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: clock[0], process_time=lambda: clock[0]))

    def short() -> None:
        calls[0] += 1
        clock[0] += 0.5 if calls[0] == 2 else 1e-6  # another process has the processor meanwhile

    found = time_in_turn(short, short, seconds=0)
    assert calls[0] > 100 * found.rounds


def test_spread() -> None:
    assert Spread.of([3.0, 1.0, 2.0, 5.0, 4.0]) == Spread(1.0, 2.0, 3.0, 4.0, 5.0)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0, 2.0, 2.0)


def test_inputs_are_made_up_from_the_signature() -> None:
    image, ids = batch_of((IMAGE, IDS), None, 4)
    assert (image.shape, image.dtype) == ((4, 3), np.float32)
    assert (ids.shape, ids.dtype) == ((4, 4), np.int64)
    assert set(np.unique(ids)) <= {0, 1}
    np.testing.assert_array_equal(image, batch_of((IMAGE,), None, 4)[0])


def test_given_inputs_are_cut_or_repeated() -> None:
    given = np.arange(6, dtype=np.float32).reshape(2, 3)
    (found,) = batch_of((IMAGE,), (given,), 3)
    np.testing.assert_array_equal(found, given[[0, 1, 0]])
    _, edges = batch_of((IMAGE, TensorSpec("edges", ("batch_1", 3), torch.float32)), (given, given), 3)
    np.testing.assert_array_equal(edges, given[[0, 1, 0]])
    fixed = TensorSpec("table", (2, 3), torch.float32)
    (kept,) = batch_of((fixed,), (given,), 1)
    np.testing.assert_array_equal(kept, given)


def test_artifacts_of_a_fixed_batch_are_timed_at_it() -> None:
    backend = FakeBackend()
    fixed = TensorSpec("x", (5, 3), torch.float32)
    pair = [artifact(backend, name, (fixed,)) for name in ("slow", "fast")]
    assert compare(*pair, batch=2, seconds=0).batch == 5
    assert {rows for *_, rows in backend.sessions} == {5}


def test_any_number_take_turns_forth_and_back() -> None:
    order = []

    def call(name: str) -> None:
        order.append(name)
        _spin(0.004)

    wall, cpu = in_turn([lambda name=name: call(name) for name in "abc"], seconds=0)  # type: ignore[misc]
    assert [len(times) for times in (*wall, *cpu)] == [7] * 6
    assert "".join(order).endswith("abccbaabccbaabccbaabc")
