"""How many samples a call may have: out of the ranges of all axes that depend on it."""

from __future__ import annotations

import pytest
import torch

from graphopt.errors import LoweringError
from graphopt.ir.batch_sizes import BatchSizes
from graphopt.ir.signature import Dimension, TensorSpec
from graphopt.ir.sizes import ANY, SizeRange


def spec(shape: tuple[Dimension, ...], *ranges: SizeRange) -> TensorSpec:
    return TensorSpec("x", shape, torch.float32, ranges)


@pytest.mark.parametrize(
    ("inputs", "samples", "taken"),
    [
        ([spec(("batch", 3))], [1, 3, 8], 32),
        ([spec(("batch", 3), SizeRange(4), ANY)], [4, 6, 11], 32),
        ([spec(("batch", 3), SizeRange(0, 2), ANY)], [1, 2], 2),
        ([spec(("batch", 3), SizeRange(40, 50), ANY)], [40, 42, 47], 40),
        ([spec(("2*b",), SizeRange(4, 8))], [4, 8], 8),
        ([spec(("3*b",))], [3, 9, 24], 30),
        ([spec(("batch",)), spec(("2*batch",), SizeRange(0, 9))], [1, 3, 4], 4),
        ([spec(("batch", "batch"), ANY, SizeRange(3, 5))], [3, 5], 5),
        ([spec(("batch",)), spec((7,))], [1, 3, 8], 7),
        ([spec(("batch",)), spec(("100-batch",), SizeRange(90))], [1, 3, 8], 10),
        ([spec(("batch",)), spec(("100-batch",), SizeRange(0, 95))], [5, 7, 12], 32),
        ([spec(("batch",)), spec(("60-2*batch",))], [1, 3, 8], 30),
        ([spec(("2*class+1",))], [3, 7, 17], 31),
    ],
)
def test_sizes_that_programs_take(inputs: list[TensorSpec], samples: list[int], taken: int) -> None:
    sizes = BatchSizes(inputs)
    assert sizes.near((1, 3, 8)) == samples
    assert sizes.taken(32) == taken


def test_what_has_no_dynamic_first_axis_takes_what_it_takes() -> None:
    assert BatchSizes([spec((5, "length"))]).taken(32) == 5
    assert BatchSizes([spec((5, "length"))]).near((1, 3)) == [1, 3]


def test_ranges_that_leave_all_sizes_are_none() -> None:
    assert spec(("batch",), ANY) == spec(("batch",))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [(ANY, "any"), (SizeRange(4), "4 or more"), (SizeRange(0, 8), "at most 8"), (SizeRange(3, 9), "3 to 9")],
)
def test_ranges_in_words(sizes: SizeRange, said: str) -> None:
    assert str(sizes) == said


@pytest.mark.parametrize("name", ["batch size", "class", "10", "x//0", "10-x", "x//2", "x%8"])
def test_what_does_not_grow_evenly_is_a_name(name: str) -> None:
    sizes = BatchSizes([spec((name, 3)), spec((4, name))])
    assert (sizes.symbol, sizes.near((1, 3))) == (name, [1, 3])
    assert sizes.shape(spec((4, name)), 3, (4, 1)) == [4, 3]


@pytest.mark.parametrize(
    "inputs",
    [
        [spec(("batch",), SizeRange(1 << 24))],
        [spec(("batch",), SizeRange(5)), spec(("batch",), SizeRange(0, 4))],
        [spec(("99999999*batch",))],
        [spec(("batch",)), spec((3, "1048577*batch"))],
    ],
)
def test_calls_of_no_size_are_refused(inputs: list[TensorSpec]) -> None:
    with pytest.raises(LoweringError, match="No call has sizes of at most 1048576 that all inputs may have"):
        BatchSizes(inputs)


@pytest.mark.parametrize(("size", "samples"), [("200000*batch", [1, 3, 5]), ("*".join(["batch"] * 9), [1, 3, 4])])
def test_inputs_are_made_up_of_sizes_that_memory_has(size: str, samples: list[int]) -> None:
    sizes = BatchSizes([spec(("batch",)), spec((size,))])
    assert sizes.near((1, 3, 8)) == samples
    assert sizes.taken(8) == 8  # of what is given


def test_a_range_of_what_does_not_grow_evenly_is_refused() -> None:
    BatchSizes([spec(("batch",)), spec(("batch%8",))])
    with pytest.raises(LoweringError, match="Axis 0 of `x` has a range and is batch%8, which does not grow or shrink"):
        BatchSizes([spec(("batch",)), spec(("batch%8",), SizeRange(2))])


def test_numbers_of_samples_that_are_no_multiple() -> None:
    inputs = [spec(("2*half", 3), SizeRange(4, 40), ANY), spec(("half",))]
    sizes = BatchSizes(inputs)
    assert [sizes.nearest(samples) for samples in (1, 7, 8, 99)] == [4, 6, 8, 40]
    assert [sizes.shape(one, 7, (0, 3)[: len(one.shape)]) for one in inputs] == [[6, 3], [3]]
    assert [sizes.at(value) for value in (1, 2, 3)] == [4, 4, 6]


def test_first_axes_of_other_names_stay_of_one_size() -> None:
    inputs = [spec(("batch", 3)), spec(("edges", 3)), spec((7, "edges"), ANY, SizeRange(5)), spec(("nodes",))]
    examples = [(7, 3), (7, 3), (7, 7), (9,)]
    sizes = BatchSizes(inputs, examples)
    shapes = [sizes.shape(one, 6, example) for one, example in zip(inputs, examples, strict=True)]
    assert shapes == [[6, 3], [6, 3], [7, 6], [9]]
    assert sizes.shape(inputs[1], 1, (7, 3)) == [5, 3]
    assert BatchSizes(inputs).shape(inputs[1], 6, (7, 3)) == [7, 3]
