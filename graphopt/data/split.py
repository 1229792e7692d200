"""One split of a run's samples: those that passes may fit, and those that judge and are never fitted.

A sample's place in the data alone says which part it is in, whoever asks and however it is read: of every `period`
samples in a row one judges, each time at another place among them, so that data in a regular order is no trap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from graphopt.data.batches import Batch, Labelled, SampleSource, rebatched
from graphopt.ir.program import Program

FEWEST = 16  # samples; of fewer, what judges would say nothing and what is left to fit not much more
_PERIOD = 10  # one in so many judges
_ENOUGH = 32  # judges; where a tenth of the samples is fewer, up to a quarter of them judges
_SHORTEST_PERIOD = 4
_MOST = 1024  # judges; all samples behind them may be fitted
_GOLDEN = 0x9E3779B1  # 2^32 over the golden ratio: multiples of it spread evenly (Knuth, TAOCP 3, section 6.4)


class Split(NamedTuple):
    """The two parts; `held_out` is None where there are too few samples to hold some out."""

    fitted: SampleSource
    held_out: SampleSource | None


def split(source: SampleSource, program: Program) -> Split:
    """Split samples in two.

    Args:
        source: All of them; at most a few hundred are read, to see how many there are.
        program: What they are for. If it takes batches of one size only, each batch stays together.
    """
    unit = program.batch_size or 1
    wanted = _PERIOD * max(_ENOUGH, unit)
    count = sum(len(batch[0]) for batch in source.batches(max(_ENOUGH, unit), wanted))
    units = count // unit
    period = min(units, max(_SHORTEST_PERIOD, min(_PERIOD, count // _ENOUGH)))
    if count < FEWEST or period < 2:
        return Split(source, None)
    return Split(Part(source, unit, period, held_out=False), Part(source, unit, period, held_out=True))


@dataclass(frozen=True)
class Part:
    """One part of a split.

    Attributes:
        source: All samples.
        unit: So many samples in a row are in the same part.
        period: Of so many units in a row one is held out.
        held_out: Whether this is the part that judges.
    """

    source: SampleSource
    unit: int
    period: int
    held_out: bool

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """Yield batches of at most `batch_size` samples, `limit` samples in all."""
        unlabelled = ((inputs, None) for inputs in self.source.batches(batch_size))
        return (inputs for inputs, _ in rebatched(self._chosen(unlabelled, limit), batch_size))

    def labelled_batches(self, batch_size: int, limit: int | None = None) -> Iterator[Labelled]:
        """Yield pairs of inputs and labels as `batches` does; labels are None where the data has none."""
        return rebatched(self._chosen(self.source.labelled_batches(batch_size), limit), batch_size)

    def place(self, index: int) -> int:
        """Return the number in the source of the sample that is number `index` of this part."""
        first, known = 0, 0
        while True:
            rows = self._rows(first, self.period * self.unit)
            if index < known + len(rows):
                return first + int(rows[index - known])
            first, known = first + self.period * self.unit, known + len(rows)

    def _chosen(self, pieces: Iterator[Labelled], limit: int | None) -> Iterator[Labelled]:
        first, left = 0, limit
        for inputs, labels in pieces:
            rows = self._rows(first, len(inputs[0]))[:left]
            first += len(inputs[0])
            if len(rows):
                yield tuple(tensor[rows] for tensor in inputs), None if labels is None else labels[rows]
            left = None if left is None else left - len(rows)
            if left == 0 or (self.held_out and first >= self._last):
                return

    @property
    def _last(self) -> int:
        """The number of the first sample behind which none is held out."""
        return max(1, _MOST // self.unit) * self.period * self.unit

    def _rows(self, first: int, count: int) -> torch.Tensor:
        """Return which of `count` samples from number `first` on are in this part, counted from `first`."""
        numbers = torch.arange(first, first + count)
        units = numbers // self.unit
        block = units // self.period
        judges = units % self.period == (block * _GOLDEN % (1 << 32)) * self.period >> 32
        judges &= numbers < self._last
        return (judges == self.held_out).nonzero().flatten()


def place(source: SampleSource, index: int) -> int:
    """Return the number in the user's data of the sample that is number `index` of `source`."""
    return source.place(index) if isinstance(source, Part) else index
