"""What the passes of a run have read of the data so far, and whether they have measured time or asked the loss.

Analyses are shared between passes, so what one of them has read counts for all that come after it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import pydantic
import torch

from graphopt.caching.digests import digest_of
from graphopt.caching.sources import is_ours
from graphopt.data.batches import Batch, Labelled, SampleSource
from graphopt.data.split import place
from graphopt.measure.budget import Timer
from graphopt.measure.stopwatch import Stopwatch
from graphopt.pipeline.context import Context

_Count = Annotated[int, pydantic.Field(ge=0, le=sys.maxsize)]  # what `islice` takes


@dataclass(frozen=True, order=True)
class Read:
    """One time that samples were gone through.

    Attributes:
        part: which samples: "samples" or "held_out", as a context calls them.
        labelled: whether their labels were read.
        batch_size: samples per batch.
        limit: samples asked for, None for all.
        steps: how many batches were taken; one more where it was seen that there are no others.
    """

    part: str
    labelled: bool
    batch_size: Annotated[_Count, pydantic.Field(ge=1)]
    limit: _Count | None
    steps: _Count


@dataclass
class Reads:
    """The record of a run.

    Attributes:
        sources: the samples of each part.
        timed: whether a time was measured.
        judged: whether code of the user's was asked that is known in this process alone: their loss, their backend.
    """

    sources: dict[str, SampleSource] = field(default_factory=dict)
    timed: bool = False
    judged: bool = False
    _known: dict[Read, str] = field(default_factory=dict)
    _going: list[_Going] = field(default_factory=list)

    def watch(self, ctx: Context) -> Context:
        """Return a context whose data, timers and loss are recorded when they are used."""
        self.sources = {part: source for part in _PARTS if (source := getattr(ctx, part)) is not None}
        samples, held_out = (_Watched(self, part) if part in self.sources else None for part in _PARTS)
        loss = None if ctx.loss is None else _watched_loss(self, ctx.loss)
        timers = _WatchedTimers(self, ctx.timers)
        return dataclasses.replace(ctx, samples=samples, held_out=held_out, timers=timers, loss=loss)

    @property
    def seen(self) -> dict[Read, str]:
        """Digests of what was read so far."""
        self._known |= {one.read: one.digest.hexdigest() for one in self._going}
        self._going = [one for one in self._going if not one.ended]
        return self._known

    def again(self, read: Read) -> str:
        """Read what was read in another run, and return the digest of what is there now; "" where there is less."""
        if read not in self.seen and read.part in self.sources:
            with contextlib.closing(self.go_through(read.part, read.labelled, read.batch_size, read.limit)) as batches:
                for _ in itertools.islice(batches, read.steps):
                    pass
        return self.seen.get(read, "")

    def go_through(self, part: str, labelled: bool, batch_size: int, limit: int | None) -> Generator[Any]:
        """Yield the batches of a part."""
        source = self.sources[part]
        going = _Going(Read(part, labelled, batch_size, limit, 0))
        self._going.append(going)
        for batch in (source.labelled_batches if labelled else source.batches)(batch_size, limit):
            going.take(digest_of(batch))
            yield batch
        going.take("the end")
        going.ended = True


_PARTS = ("samples", "held_out")


@dataclass
class _Going:
    """Samples that are being gone through."""

    read: Read
    digest: Any = field(default_factory=hashlib.sha256)
    ended: bool = False

    def take(self, content: str) -> None:
        self.digest.update(content.encode())
        self.read = dataclasses.replace(self.read, steps=self.read.steps + 1)


class _Watched:
    """Samples that record what is read of them."""

    def __init__(self, reads: Reads, part: str) -> None:
        self._reads, self._part = reads, part

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """Yield batches as the samples do."""
        return self._reads.go_through(self._part, False, batch_size, limit)

    def labelled_batches(self, batch_size: int, limit: int | None = None) -> Iterator[Labelled]:
        """Yield pairs of inputs and labels as the samples do."""
        return self._reads.go_through(self._part, True, batch_size, limit)

    def place(self, index: int) -> int:
        """Return the number in the user's data of the sample that is number `index`."""
        return place(self._reads.sources[self._part], index)


class _WatchedTimers(Mapping[str, Timer]):
    """Timers by target; that one was taken is recorded."""

    def __init__(self, reads: Reads, timers: Mapping[str, Timer]) -> None:
        self._reads, self._timers = reads, timers

    def __getitem__(self, name: str) -> Timer:
        self._reads.timed = True
        timer = self._timers[name]
        self._reads.judged |= isinstance(timer, Stopwatch) and not is_ours(type(timer.backend).__module__)
        return timer

    def __contains__(self, name: object) -> bool:
        return name in self._timers

    def __iter__(self) -> Iterator[str]:
        return iter(self._timers)

    def __len__(self) -> int:
        return len(self._timers)


def _watched_loss(reads: Reads, loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def watched(*args: Any) -> torch.Tensor:
        reads.judged = True
        return loss(*args)

    return watched
