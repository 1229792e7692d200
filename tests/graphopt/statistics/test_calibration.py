"""Calibration: observers as nodes, statistics gathered once, bad data named."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from graphopt.capturing.capture import capture
from graphopt.data.batches import Batch
from graphopt.errors import DataError, PassError
from graphopt.ir.invariants import check_invariants
from graphopt.ir.operators import short_name
from graphopt.ir.program import Program
from graphopt.pipeline.context import Context
from graphopt.quantization.histogram import ChannelMean, Histogram
from graphopt.statistics.calibration import Calibration, insert_observers
from graphopt.testing import TensorSamples


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


class Elementwise(nn.Module):
    """Computes every sample by itself, to the bit."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 3).sigmoid() - 1


def data(count: int = 40, *, seed: int = 0) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def program(model: nn.Module | None = None) -> Program:
    return capture(model or Net(), (data(2),))


class Counting(TensorSamples):
    """Samples that count how often they are run through."""

    runs = 0

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        type(self).runs += 1
        return super().batches(batch_size, limit)


def calibration(
    subject: Program, *tensors: Tensor, limit: int | None = None, batch_size: int = 8, ctx: Context | None = None
) -> Calibration:
    ctx = ctx or Context(original=subject, samples=TensorSamples(tensors))
    return Calibration.of(ctx, subject, "test", limit=limit, batch_size=batch_size)


def test_gathers_what_passes_through_each_node() -> None:
    subject = program()
    x = data()
    seen, shown = calibration(subject, x).gather([("relu", Histogram()), ("x", Histogram())])
    hidden = torch.nn.functional.linear(x, subject.state_dict()["first.weight"], subject.state_dict()["first.bias"])
    assert seen.high == pytest.approx(float(hidden.max()), rel=1e-5)
    assert seen.low == 0.0
    assert int(seen.counts.sum()) == 40 * 6
    assert (shown.low, shown.high) == (float(x.min()), float(x.max()))


def test_observers_are_nodes() -> None:
    before = program()
    observed = insert_observers(before, ["x", "relu", "linear_1"])
    check_invariants(before, observed, "calibration")
    assert [short_name(node) for node in observed.graph.nodes].count("observe") == 3
    torch.testing.assert_close(observed(data()), before(data()), rtol=0, atol=0)


def test_unknown_node() -> None:
    with pytest.raises(PassError, match="no node `nowhere`"):
        insert_observers(program(), ["nowhere"])


def test_each_statistic_is_gathered_once() -> None:
    subject = program()
    Counting.runs = 0
    ctx = Context(original=subject, samples=Counting((data(),)))
    first = calibration(subject, ctx=ctx).gather([("x", Histogram()), ("relu", Histogram())])
    again = calibration(subject, ctx=ctx).gather([("relu", Histogram()), ("x", Histogram())])
    assert Counting.runs == 1
    assert first[0] is again[1]
    calibration(subject, ctx=ctx).gather([("relu", Histogram()), ("relu", ChannelMean(-1))])
    assert Counting.runs == 2


@pytest.mark.parametrize("batch_size", [1, 3, 40])
def test_batch_size_does_not_matter(batch_size: int) -> None:
    subject = program(Elementwise())
    (wanted,) = calibration(subject, data()).gather([("sigmoid", Histogram())])
    (found,) = calibration(subject, data(), batch_size=batch_size).gather([("sigmoid", Histogram())])
    assert torch.equal(found.counts, wanted.counts)
    assert (found.low, found.high, found.first) == (wanted.low, wanted.high, wanted.first)


def test_limit() -> None:
    (found,) = calibration(program(), data(), limit=10).gather([("x", Histogram())])
    assert int(found.counts.sum()) == 10 * 4


def test_keeps_no_activations() -> None:
    alive: list[weakref.ref[Tensor]] = []

    class Watching(Histogram):
        def update(self, x: Tensor) -> None:
            gc.collect()
            assert sum(reference() is not None for reference in alive) <= 1  # the one that computes this one
            alive.append(weakref.ref(x))
            super().update(x)

    one = calibration(program(), data())
    gc.freeze()  # what came before is no part of this, and takes seconds to look through
    try:
        one.gather([("linear", Watching()), ("relu", Watching())])
    finally:
        gc.unfreeze()
    assert len(alive) == 10


def test_without_samples() -> None:
    subject = program()
    with pytest.raises(DataError, match="--data"):
        calibration(subject, ctx=Context(original=subject))


def test_empty_samples() -> None:
    with pytest.raises(DataError, match="holds no batch"):
        calibration(program(), data(0)).gather([("x", Histogram())])


def test_names_the_batch_that_holds_nan() -> None:
    x = data()
    x[17, 2] = float("nan")
    with pytest.raises(DataError, match="batch 2 holds NaN in input `x`"):
        calibration(program(), x).gather([("relu", Histogram())])


def test_names_the_node_that_overflows() -> None:
    class Overflowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Elementwise()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner((x * 50).exp())

    x = data() / 100
    x[9] = 10.0
    subject = program(Overflowing())
    one = calibration(subject, x)
    with pytest.raises(DataError, match="batch 1 makes `exp` NaN or infinite"):
        one.gather([("exp", Histogram())])
    with pytest.raises(DataError, match="`exp`"):  # nothing half-gathered is handed out later
        one.gather([("exp", Histogram())])


def test_infinite_inputs_nobody_asks_about_are_fine() -> None:
    """A mask may be -inf."""
    x = data()
    x[3, 1] = float("-inf")
    (found,) = calibration(program(Elementwise()), x).gather([("sigmoid", Histogram())])
    assert found.high <= 1.0


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ((torch.zeros(8, 5),), "gives 8x5 float32 for the input x: batchx4"),
        ((torch.zeros(8, 4, 1),), "gives 8x4x1"),
        ((torch.zeros(8, 4, dtype=torch.float64),), "float64"),
        ((torch.zeros(8, 4), torch.zeros(8, 4)), "holds 2 tensors, the program takes 1"),
    ],
)
def test_misfits(tensors: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        calibration(program(), *tensors).gather([("x", Histogram())])


def test_fixed_batch_leaves_out_the_incomplete_last_one() -> None:
    subject = capture(Net(), (data(6),), dynamic_shapes={"x": {0: None}})
    (found,) = calibration(subject, data(20)).gather([("x", Histogram())])
    assert int(found.counts.sum()) == 18 * 4
    with pytest.raises(DataError, match="6 samples"):
        calibration(subject, data(5)).gather([("x", Histogram())])


def test_keyword_inputs() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
            return x * scale

    subject = capture(Two(), (data(2),), {"scale": torch.ones(2, 4)})
    (found,) = calibration(subject, data(), torch.full((40, 4), 2.0)).gather([("mul", Histogram())])
    assert found.high == pytest.approx(2 * float(data().max()))
