"""Example inputs that are made up: what is written to disk holds nothing of the user's data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from graphopt.errors import CaptureError, first_line
from graphopt.ir.batch_sizes import BatchSizes
from graphopt.ir.devices import OUT_OF_MEMORY
from graphopt.ir.finite import all_finite
from graphopt.ir.signature import TensorSpec

_ROWS = 2
_ENOUGH = 10
_MOST_VARIED = 4  # inputs that are tried otherwise than the rest
_Filling = Callable[[torch.Size, torch.Generator], torch.Tensor]

_FLOATS: tuple[_Filling, ...] = (
    lambda size, generator: torch.randn(size, generator=generator),
    lambda size, generator: torch.rand(size, generator=generator),  # for logarithms and roots
)
# 0 and 1 are valid token ids, masks and labels of nearly any model; offsets start at 0, lengths do not.
_INTEGERS: tuple[_Filling, ...] = (
    lambda size, generator: torch.randint(0, 2, size, generator=generator),
    lambda size, _: torch.zeros(size),
    lambda size, _: torch.ones(size),
    lambda size, _: torch.full(size, 16),
)
_LADDER = [
    round(2 ** (step / 2)) for step in range(2, 62)
]  # where a program runs on none of these: ids that start at 1000


def drawn(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Return what nearly any model takes: normal random floats, integers 0 and 1."""
    kind = _FLOATS if dtype.is_floating_point or dtype.is_complex else _INTEGERS
    return kind[0](torch.Size(shape), generator).to(dtype)


def made_up_inputs(
    inputs: Sequence[TensorSpec],
    examples: Sequence[torch.Tensor],
    run: Callable[[tuple[torch.Tensor, ...]], Sequence[torch.Tensor]],
) -> tuple[torch.Tensor, ...]:
    """Make up inputs that a program runs on: two rows where any number fits, the same each time.

    Args:
        inputs: what it takes.
        examples: some that it takes, for the sizes of other dynamic axes.
        run: runs it, without a trace on it.

    Returns:
        Tensors in the order of `inputs`, for which outputs are finite if any were found for which they are.

    Raises:
        CaptureError: the program runs on nothing that was made up.
    """
    refused: Exception | None = None
    runs: tuple[torch.Tensor, ...] | None = None
    for tried, made in enumerate(_candidates(inputs, examples)):
        if runs is not None and tried >= _ENOUGH:  # a program may return infinity whatever it is given
            break
        try:
            outputs = run(tuple(tensor.clone() for tensor in made))
        except OUT_OF_MEMORY:
            raise
        except Exception as err:  # an operator may raise anything where a value does not suit it
            refused = err
            continue
        if all(all_finite(output) for output in outputs):
            return made
        runs = runs or made
    if runs is None:
        assert refused is not None  # there is a first candidate
        raise CaptureError(
            "The program cannot be written without some of your data: it runs on no example inputs that are made up "
            f"({first_line(refused)}). Let it take inputs of any value."
        ) from refused
    return runs


def _candidates(inputs: Sequence[TensorSpec], examples: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield inputs to try: all filled alike, then one of them otherwise than the rest."""
    kinds = [_FLOATS if t.is_floating_point() or t.is_complex() else _INTEGERS for t in examples]
    most = max(map(len, kinds), default=1)
    alike = [[min(place, len(kind) - 1) for kind in kinds] for place in range(most)]
    single = [
        [place if index == other else min(rest, len(kind) - 1) for index, kind in enumerate(kinds)]
        for rest in range(most)
        for other in range(min(len(kinds), _MOST_VARIED))
        for place in range(len(kinds[other]))
    ]
    for rows in (_ROWS, None):
        sizes = list(_sizes(inputs, examples, rows))
        for fillings in (*alike, *single):
            generator = torch.Generator().manual_seed(0)
            yield tuple(
                kind[place](size, generator).to(example.dtype).to(example.device)
                for kind, place, size, example in zip(kinds, fillings, sizes, examples, strict=True)
            )
        for step in _LADDER if _INTEGERS in kinds else ():
            generator = torch.Generator().manual_seed(0)
            yield tuple(
                (torch.full(size, step) if kind is _INTEGERS else kind[0](size, generator))
                .to(example.dtype)
                .to(example.device)
                for kind, size, example in zip(kinds, sizes, examples, strict=True)
            )


def _sizes(inputs: Sequence[TensorSpec], examples: Sequence[torch.Tensor], rows: int | None) -> Iterator[torch.Size]:
    """Yield the shapes of the example, with `rows` samples where that many fit, else with the fewest that are more."""
    sizes = BatchSizes(inputs)
    for spec, example in zip(inputs, examples, strict=True):
        if rows is None:
            yield example.shape
            continue
        others = [spec.range_of(0).nearest(rows), *example.shape[1:]] if spec.batched else example.shape
        yield torch.Size(sizes.shape(spec, sizes.at(rows), others))
