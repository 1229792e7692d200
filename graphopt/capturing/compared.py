"""A model beside the program that was captured of it, with inputs of several sizes: each are run once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from graphopt.capturing.checks import difference, resized, run_model
from graphopt.errors import CaptureError, first_line
from graphopt.ir.program import Program

Shapes = tuple[tuple[int, ...], ...]


class Compared:
    """What a model and a program of it were found to give, by the shapes of the inputs.

    Args:
        model: the user's.
        program: what was captured of it. Other ranges of its sizes change nothing.
    """

    def __init__(self, model: nn.Module, program: Program) -> None:
        self._model, self._program = model, program
        self._found: dict[Shapes, tuple[str, str]] = {}

    def at(self, shapes: Iterable[Sequence[int]]) -> tuple[str, str]:
        """Run both on inputs of these shapes.

        Returns:
            How the program differs, that it fails included, and why the model fails, of which the program is not run;
            "" where it does not.
        """
        wanted = tuple(map(tuple, shapes))
        if wanted not in self._found:
            self._found[wanted] = self._run(wanted)
        return self._found[wanted]

    def agree(self, shapes: Iterable[Sequence[int]]) -> bool:
        """Whether both were run on inputs of these shapes and gave the same."""
        return self._found.get(tuple(map(tuple, shapes))) == ("", "")

    def _run(self, shapes: Shapes) -> tuple[str, str]:
        examples = zip(self._program.flat_examples(), shapes, strict=True)
        args, kwargs = self._program.unflatten([resized(tensor, shape) for tensor, shape in examples])
        try:
            expected = run_model(self._model, args, kwargs)
        except CaptureError as err:
            return "", getattr(err, "reason", first_line(err))
        return difference(self._program, expected, args, kwargs), ""
