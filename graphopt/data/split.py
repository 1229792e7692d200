"""One split of a run's samples: those that passes may fit, those they choose by, and those that no pass sees.

A sample's place in the data alone says which part it is in, whoever asks and however it is read: of every `period`
samples in a row one judges, each time at another place among them, and of two that judge one is for reports alone, now
the first and now the second, so that data in a regular order is no trap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch

from graphopt.data.batches import Batch, Labelled, SampleSource, batch_count, rebatched, taken
from graphopt.ir.program import Program

FEWEST = 16  # samples; of fewer, what judges would say nothing and what is left to fit not much more
_PERIOD = 10  # one in so many judges
_ENOUGH = 32  # judges; where a tenth of the samples is fewer, up to a quarter of them judges
_SHORTEST_PERIOD = 4
_FEWEST_OF_THREE = 2 * FEWEST  # samples; of fewer, half of what judges would say nothing
_MOST = 1024  # judges; all samples behind them may be fitted
_ALL = 1 << 62
_PIECE = 4096  # samples whose part is looked up at once
_GOLDEN = 0x9E3779B1  # 2^32 over the golden ratio: multiples of it spread evenly (Knuth, TAOCP 3, section 6.4)


Role = Literal["fitted", "held out", "unseen"]


class Split(NamedTuple):
    """The parts of a run's samples.

    Attributes:
        fitted: what passes may fit.
        held_out: what passes choose by, and never fit; None where there are too few samples to hold some out.
        unseen: what only reports are made of; None where there are too few samples for three parts.
    """

    fitted: SampleSource
    held_out: SampleSource | None
    unseen: SampleSource | None


def split(source: SampleSource, program: Program) -> Split:
    """Split samples in three, in two where there are few.

    Args:
        source: All of them; at most a few hundred are read, to see how many there are.
        program: What they are for. What it takes at the least stays together.
    """
    unit = program.takes(1)
    wanted = _PERIOD * max(_ENOUGH, unit)
    count = sum(batch_count(batch) for batch in source.batches(max(_ENOUGH, unit), wanted))
    units = count // unit
    period = min(units, max(_SHORTEST_PERIOD, min(_PERIOD, count // _ENOUGH)))
    if count < FEWEST or period < 2:
        return Split(source, None, None)
    if count < _FEWEST_OF_THREE or units < 2 * _SHORTEST_PERIOD:
        return Split(Part(source, unit, period, ("fitted",)), Part(source, unit, period, ("held out", "unseen")), None)
    period = min(period, units // 2)
    return Split(*(Part(source, unit, period, (role,)) for role in get_args(Role)))


def halves(source: SampleSource, unit: int) -> tuple[SampleSource, SampleSource]:
    """Split samples in two like halves, none of which is fitted: what passes choose by, and what reports are made of.

    Args:
        source: All of them.
        unit: So many samples in a row stay together.
    """
    return Part(source, unit, 1, ("held out",), _ALL), Part(source, unit, 1, ("unseen",), _ALL)


@dataclass(frozen=True)
class Part:
    """One part of a split.

    Attributes:
        source: All samples.
        unit: So many samples in a row are in the same part.
        period: Of so many units in a row one judges: it is held out or unseen.
        roles: What this part holds.
        most: Samples that judge at most; all behind them may be fitted.
    """

    source: SampleSource
    unit: int
    period: int
    roles: tuple[Role, ...]
    most: int = _MOST

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """Yield batches of at most `batch_size` samples, `limit` samples in all."""
        unlabelled = ((inputs, None) for inputs in self.source.batches(batch_size))
        return (inputs for inputs, _ in rebatched(self._chosen(unlabelled, limit), batch_size))

    def labelled_batches(self, batch_size: int, limit: int | None = None) -> Iterator[Labelled]:
        """Yield pairs of inputs and labels as `batches` does; labels are None where the data has none."""
        return rebatched(self._chosen(self.source.labelled_batches(batch_size), limit), batch_size)

    def place(self, index: int) -> int:
        """Return the number in the source of the sample that is number `index` of this part.

        Raises:
            IndexError: the part holds fewer samples.
        """
        first, known = 0, 0
        while True:
            rows = self._rows(first, _PIECE)
            if index < known + len(rows):
                return first + int(rows[index - known])
            first, known = first + _PIECE, known + len(rows)
            if "fitted" not in self.roles and first >= self._last:
                raise IndexError(f"This part of the samples holds at most {known}; none is number {index}.")

    def _chosen(self, pieces: Iterator[Labelled], limit: int | None) -> Iterator[Labelled]:
        first, left = 0, limit
        for inputs, labels in pieces:
            count = batch_count(inputs)
            rows = self._rows(first, count)[:left]
            first += count
            if len(rows):
                yield taken(inputs, rows), None if labels is None else labels[rows]
            left = None if left is None else left - len(rows)
            if left == 0 or ("fitted" not in self.roles and first >= self._last):
                return

    @property
    def _last(self) -> int:
        """The number of the first sample behind which all may be fitted."""
        return max(2, self.most // self.unit) * self.period * self.unit

    def _rows(self, first: int, count: int) -> torch.Tensor:
        """Return which of `count` samples from number `first` on are in this part, counted from `first`."""
        numbers = torch.arange(first, first + count)
        units = numbers // self.unit
        block = units // self.period
        judges = units % self.period == _golden(block, self.period)
        judges &= numbers < self._last
        second = (block + _golden(block // 2, 2)) % 2 == 1  # of two blocks in a row one
        parts: dict[Role, torch.Tensor] = {"fitted": ~judges, "held out": judges & ~second, "unseen": judges & second}
        return torch.stack([parts[role] for role in self.roles]).any(0).nonzero().flatten()


def _golden(numbers: torch.Tensor, count: int) -> torch.Tensor:
    """Draw one of `count` for each number, evenly and in no period."""
    return (numbers * _GOLDEN % (1 << 32)) * count >> 32


def place(source: SampleSource, index: int) -> int:
    """Return the number in the user's data of the sample that is number `index` of `source`."""
    own = getattr(source, "place", None)
    return int(own(index)) if own is not None else index
