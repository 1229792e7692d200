"""Example inputs that are made up: what is written to disk holds nothing of the user's data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch

from graphopt.errors import CaptureError, first_line
from graphopt.ir.finite import all_finite
from graphopt.ir.signature import TensorSpec

_ROWS = 2
_TRIES = 200
_Filling = Callable[[torch.Size, torch.Tensor, torch.Generator], torch.Tensor]

_FLOATS: tuple[_Filling, ...] = (
    lambda size, _, generator: torch.randn(size, generator=generator),
    lambda size, _, generator: torch.rand(size, generator=generator),  # for logarithms and roots
)
# 0 and 1 are valid token ids, masks and labels of nearly any model; offsets start at 0, lengths do not; where nothing
# else will do, one value of the example's range everywhere.
_INTEGERS: tuple[_Filling, ...] = (
    lambda size, _, generator: torch.randint(0, 2, size, generator=generator),
    lambda size, _, __: torch.zeros(size),
    lambda size, _, __: torch.ones(size),
    lambda size, example, _: example.max().expand(size) if example.numel() else torch.zeros(size),
)


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
    for made in itertools.islice(_candidates(inputs, examples), _TRIES):
        try:
            outputs = run(tuple(tensor.clone() for tensor in made))
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
    kinds = [_FLOATS if t.is_floating_point() or t.is_complex() else _INTEGERS for t in examples]
    for rows in (_ROWS, None):
        for fillings in sorted(itertools.product(*map(range, map(len, kinds))), key=sum):
            generator = torch.Generator().manual_seed(0)
            chosen = [kind[index] for kind, index in zip(kinds, fillings, strict=True)]
            yield tuple(
                filling(size, example, generator).to(example.dtype).to(example.device)
                for filling, size, example in zip(chosen, _sizes(inputs, examples, rows), examples, strict=True)
            )


def _sizes(inputs: Sequence[TensorSpec], examples: Sequence[torch.Tensor], rows: int | None) -> Iterator[torch.Size]:
    """Yield the shapes of the example, with `rows` samples where any number fits."""
    batches = {spec.shape[0] for spec in inputs if spec.batched}
    for spec, example in zip(inputs, examples, strict=True):
        axes = zip(spec.shape, example.shape, strict=True)
        yield torch.Size(rows if rows is not None and axis in batches else size for axis, size in axes)
