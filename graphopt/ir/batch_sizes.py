"""How many samples a call of a program may have, and the sizes that all its inputs have then."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Iterator, Sequence

from graphopt.errors import LoweringError, printable
from graphopt.ir.signature import TensorSpec, batch_size
from graphopt.ir.size_expressions import evaluate, linear, names_in
from graphopt.ir.sizes import ANY, MOST_AT_LEAST, SizeRange


class BatchSizes:
    """Numbers of samples in a call: those that all axes have sizes for, of which the first says how they depend on it.

    Attributes:
        symbol: the name that first axes grow with ("batch", of "2*batch" too), "" where none is dynamic.
        values: what it may be.
        alike: names of first axes that are as large as the first, with the sizes they may have.
    """

    def __init__(self, inputs: Sequence[TensorSpec], examples: Sequence[Sequence[int]] = ()) -> None:
        """Find the values for which every axis that depends on the name has a size in its range.

        Args:
            inputs: of the program.
            examples: shapes of inputs that it was captured with. First axes of other names that are of one size there
                stay so: a kernel may ask for it where no trace does.

        Raises:
            LoweringError: there are none, or only such of larger sizes than memory should be asked for, or a size is
                bound that does not grow or shrink evenly with the name.
        """
        self._inputs = tuple(inputs)
        first = next((str(spec.shape[0]) for spec in inputs if spec.batched), "")
        line = linear(first)
        self.symbol, self._factor, self._offset = line if line and line.factor > 0 else (first, 1, 0)
        pairs = zip(self._inputs, examples, strict=bool(examples))
        rows = {str(spec.shape[0]): example[0] for spec, example in pairs if spec.batched}
        self.alike = {
            name: self._range(name) for name in rows if names_in(name) == (name,) and rows[name] == rows[first]
        }
        self.values = functools.reduce(operator.and_, self._bounds(), SizeRange(1))
        if not self.symbol:
            return
        empty = self.values.most is not None and self.values.least > self.values.most
        if empty or not self._is_made(self.values.least):
            raise LoweringError(
                f"No call has sizes of at most {MOST_AT_LEAST} that all inputs may have: "
                f"{'; '.join(printable(str(spec)) for spec in self._inputs)}. Export with other ranges."
            )

    def near(self, wanted: Iterable[int]) -> list[int]:
        """Return numbers of samples, each once: those that many places from below, or the last.

        The last is where inputs of them are made up, too: see `MOST_AT_LEAST`.
        """
        below = self.values.least - 1
        return [*dict.fromkeys(self.at(below + place) for place in wanted)]

    def shape(self, spec: TensorSpec, samples: int, example: Sequence[int]) -> list[int]:
        """Return the sizes of an input for so many samples, or as many as fit; others are the example's."""
        value = self._value(samples)
        known = {name: sizes.nearest(self._samples(value)) for name, sizes in self.alike.items()}
        known[self.symbol] = value
        sizes = [size if isinstance(size, int) else evaluate(size, known) for size in spec.shape]
        return [own if size is None else size for size, own in zip(sizes, example, strict=True)]

    def taken(self, samples: int) -> int:
        """Return the number of samples that a call takes which is nearest below, else the smallest of all."""
        fixed = batch_size(self._inputs)
        if fixed is not None or not self.symbol:
            return fixed or samples
        return self.nearest(samples)

    def nearest(self, samples: int) -> int:
        """Return the same as far as first axes are dynamic, whatever others of a fixed size take."""
        return self._samples(self._value(samples))

    def at(self, value: int) -> int:
        """Return how many samples a call has where the name has a value, or one near that it may have."""
        nearest = self.values.nearest(value)
        return self._samples(next(made for made in range(nearest, -1, -1) if self._is_made(made)))

    def _is_made(self, value: int) -> bool:
        """Whether inputs are made up where the name has a value: of no axis that would be larger than memory."""
        sizes = [evaluate(str(size), {self.symbol: value}) or 0 for spec in self._inputs for size in spec.shape]
        return all(size <= MOST_AT_LEAST for size in sizes)

    def _value(self, samples: int) -> int:
        return self.values.nearest((samples - self._offset) // self._factor) if self.symbol else samples

    def _samples(self, value: int) -> int:
        return self._factor * value + self._offset

    def _range(self, name: str) -> SizeRange:
        """Return which sizes all axes of a name may have."""
        named = [(spec, axis) for spec in self._inputs for axis, size in enumerate(spec.shape) if size == name]
        return functools.reduce(operator.and_, [spec.range_of(axis) for spec, axis in named])

    def _bounds(self) -> Iterator[SizeRange]:
        """Yield what the name may be for the sake of one axis."""
        if not self.symbol:
            return
        yield solved(self._factor, self._offset, SizeRange(1))
        for spec in self._inputs:
            for axis, size in enumerate(spec.shape):
                if not isinstance(size, str) or (size != self.symbol and self.symbol not in names_in(size)):
                    continue
                line = (self.symbol, 1, 0) if size == self.symbol else linear(size)
                if line is not None:
                    yield solved(line[1], line[2], spec.range_of(axis))
                elif spec.range_of(axis) != ANY:
                    raise LoweringError(
                        f"Axis {axis} of `{printable(spec.name)}` has a range and is {printable(size)}, which does not "
                        f"grow or shrink evenly with `{printable(self.symbol)}`. Export it without the range."
                    )


def solved(factor: int, offset: int, sizes: SizeRange) -> SizeRange:
    """Return the numbers for which `factor * number + offset` is one of some sizes."""
    least, most = sizes.least - offset, None if sizes.most is None else sizes.most - offset
    if factor < 0:
        least, most = (0 if most is None else -most), -least
    least = -(-least // abs(factor))
    return SizeRange(max(least, 0), None if most is None else most // abs(factor))
