"""The cut against all assignments there are, and what is said of what it leaves float."""

from __future__ import annotations

import itertools
import random

import pytest

from graphopt.measure.cut import Crossing, Island, Operator, islands, on_integers, seconds

US = 1e-6


def chain(
    *times: tuple[float, float | None], quantize: float = 1.0, dequantize: float = 1.0
) -> tuple[list[Operator], list[Crossing]]:
    """Operators one behind another between float ones; times on integers and as float, in microseconds."""
    names = [f"op{index}" for index in range(len(times))]
    operators = [
        Operator(name, integer * US, None if floating is None else floating * US)
        for name, (integer, floating) in zip(names, times, strict=True)
    ]
    around = itertools.pairwise(["", *names, ""])
    return operators, [Crossing(before, (after,), quantize * US, dequantize * US) for before, after in around]


def test_a_layer_pays_for_what_turns_its_values() -> None:
    assert on_integers(*chain((5, 8))) == {"op0"}
    assert on_integers(*chain((7, 8))) == set()
    assert on_integers(*chain((7, 8), (7, 8), (7, 8))) == {"op0", "op1", "op2"}


def test_where_two_assignments_are_as_fast_more_is_on_integers() -> None:
    assert on_integers(*chain((6, 8))) == {"op0"}
    assert on_integers(*chain((0, 0), quantize=0, dequantize=0)) == {"op0"}


def test_a_value_is_turned_once_however_many_read_it() -> None:
    readers = [Operator(f"op{index}", 1 * US, 2 * US) for index in range(3)]
    shared = [Crossing("", tuple(one.name for one in readers), 2.5 * US, 0)]
    apart = [Crossing("", (one.name,), 2.5 * US, 0) for one in readers]
    assert on_integers(readers, shared) == {"op0", "op1", "op2"}
    assert on_integers(readers, apart) == set()


def test_what_cannot_be_float_stays_and_draws_its_neighbours_along() -> None:
    assert on_integers(*chain((8.5, 9), (5, None), (8.5, 9))) == {"op0", "op1", "op2"}


@pytest.mark.parametrize("seed", range(30))
def test_no_assignment_takes_less_time(seed: int) -> None:
    draw = random.Random(seed)
    names = [f"op{index}" for index in range(7)]
    operators = [
        Operator(name, draw.randrange(9) * US, None if draw.random() < 0.1 else draw.randrange(9) * US)
        for name in names
    ]
    crossings = [
        Crossing(
            draw.choice(["", *names[:start]]),
            tuple(draw.choices(["", *names[start:]], k=draw.randrange(1, 4))),
            draw.randrange(4) * US,
            draw.randrange(4) * US,
        )
        for start in draw.choices(range(7), k=9)
    ]
    tied = {one.name for one in operators if one.floating is None}
    every = (set(chosen) | tied for size in range(8) for chosen in itertools.combinations(names, size))
    least = min(seconds(operators, crossings, chosen) for chosen in every)
    chosen = on_integers(operators, crossings)
    assert tied <= chosen
    assert seconds(operators, crossings, chosen) == pytest.approx(least, abs=1e-11)


def test_islands_are_told_with_both_times() -> None:
    operators, crossings = chain((9, 3), (9, 4), (1, None), (6, 2), (1, None))
    chosen = on_integers(operators, crossings)
    assert chosen == {"op2", "op4"}
    before, between = islands(operators, crossings, chosen)
    assert before == Island(("op0", "op1"), pytest.approx(19 * US), pytest.approx(8 * US))
    assert between == Island(("op3",), pytest.approx(6 * US), pytest.approx(4 * US))
