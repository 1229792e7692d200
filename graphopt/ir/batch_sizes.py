"""How many samples a call of a program may have, and the sizes that all its inputs have then."""

from __future__ import annotations

import bisect
import functools
import operator
from collections.abc import Iterable, Sequence

from graphopt.errors import LoweringError, printable
from graphopt.ir.signature import TensorSpec, batch_size
from graphopt.ir.sizes import MOST_AT_LEAST, SizeRange, evaluate, names_in

_LARGEST = 1 << 24  # samples in one call


class BatchSizes:
    """Numbers of samples in a call, by the values of the name that first axes have ("batch", "2*batch")."""

    def __init__(self, inputs: Sequence[TensorSpec], examples: Sequence[Sequence[int]] = ()) -> None:
        """Find the values for which every axis that depends on the name has a size in its range.

        Args:
            inputs: of the program. Larger values make no axis smaller.
            examples: shapes of inputs that it was captured with. First axes of other names that are of one size there
                stay so: a kernel may ask for it where no trace does.

        Raises:
            LoweringError: there are none, or only such of more samples than memory should be asked for.
        """
        self._inputs = tuple(inputs)
        self._first = next((str(spec.shape[0]) for spec in inputs if spec.batched), "")
        self.symbol = self._symbol()  # "" where no first axis is dynamic
        pairs = zip(self._inputs, examples, strict=bool(examples))
        rows = {str(spec.shape[0]): example[0] for spec, example in pairs if spec.batched}
        alike = [name for name in rows if names_in(name) == (name,) and rows[name] == rows[self._first]]
        self._others = {name: self._range(name) for name in alike}
        values = range(1, _LARGEST + 1)
        least = bisect.bisect_left(
            values, True, key=lambda value: self.samples(value) > 0 and all(s >= r.least for s, r in self._sizes(value))
        )
        most = bisect.bisect_left(
            values, True, key=lambda value: any(r.most is not None and s > r.most for s, r in self._sizes(value))
        )
        self.range = SizeRange(least + 1, most if most < _LARGEST else None)
        if self.symbol and (least >= most or self.samples(self.range.least) > MOST_AT_LEAST):
            raise LoweringError(
                f"No call of at most {MOST_AT_LEAST} samples has sizes that all inputs may have: "
                f"{'; '.join(printable(str(spec)) for spec in self._inputs)}. Export with other ranges."
            )

    def near(self, wanted: Iterable[int]) -> list[int]:
        """Return values of the name, each once, as many as are wanted above the smallest but within its range."""
        below = self.range.least - 1
        return [*dict.fromkeys(self.range.nearest(below + value) for value in wanted)]

    def shape(self, spec: TensorSpec, value: int, example: Sequence[int]) -> list[int]:
        """Return the sizes of an input at a value of the name; those that do not depend on it are the example's."""
        known = {name: sizes.nearest(self.samples(value)) for name, sizes in self._others.items()}
        known[self.symbol] = value
        sizes = [size if isinstance(size, int) else evaluate(size, known) for size in spec.shape]
        return [own if size is None else size for size, own in zip(sizes, example, strict=True)]

    def taken(self, samples: int) -> int:
        """Return the number of samples that a call takes which is nearest below, else the smallest of all."""
        fixed = batch_size(self._inputs)
        if fixed is not None or not self.symbol:
            return fixed or samples
        return self.samples(self.value(samples))

    def value(self, samples: int) -> int:
        """Return the value of the name at which a call takes so many samples, or fewer, else the smallest."""
        if not self.symbol:
            return samples
        values = range(1, _LARGEST + 1)
        return self.range.nearest(bisect.bisect_right(values, samples, key=self.samples))

    def samples(self, value: int) -> int:
        """Return how many samples a call has at a value of the name."""
        return int(evaluate(self._first, {self.symbol: value})) if self.symbol else value

    def _symbol(self) -> str:
        """Return the one name that the first axis grows with, else what the axis is called as a whole."""
        names = names_in(self._first)
        if len(names) == 1:
            ends = [evaluate(self._first, {names[0]: value}) for value in (1, _LARGEST)]
            if None not in ends and ends[0] < ends[1]:
                return names[0]
        return self._first

    def _range(self, name: str) -> SizeRange:
        """Return which sizes all axes of a name may have."""
        named = [(spec, axis) for spec in self._inputs for axis, size in enumerate(spec.shape) if size == name]
        return functools.reduce(operator.and_, [spec.range_of(axis) for spec, axis in named])

    def _sizes(self, value: int) -> Iterable[tuple[int, SizeRange]]:
        for spec in self._inputs:
            for axis, expression in enumerate(spec.shape):
                size = evaluate(expression, {self.symbol: value}) if isinstance(expression, str) else None
                if size is not None:
                    yield size, spec.range_of(axis)
