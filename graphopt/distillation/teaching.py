"""Teaching: the lesson that a distillation plan describes, of any number of teachers and of labels.

    loss = alpha * mean over taught outputs + (1 - alpha) * labels + sum over pairs of weight * loss

Without an output that is taught the labels count whole. A student is judged by outputs and labels; by its pairs, where
there is nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from graphopt.data.batches import Batch, batch_count, taken
from graphopt.distillation.label_losses import LabelLoss
from graphopt.distillation.links import By
from graphopt.distillation.named_losses import Loss
from graphopt.distillation.pool import Pool
from graphopt.distillation.teachers import Reader
from graphopt.errors import DataError

Wanted = Sequence[Batch]  # by teacher

_MOST_CACHED = 1 << 29  # bytes of what teachers say


@dataclass(frozen=True)
class Term:
    """One part of the loss.

    Attributes:
        name: what it is called: an output, or the address of a value.
        index: of the student's value among its outputs and taps.
        by: who teaches it.
        taught: of the teacher's value among what its reader gives, or of the student's deeper value.
        loss: of both.
        weight: of the loss.
        alike: whether it compares values of one shape.
    """

    name: str
    index: int
    by: By
    taught: int
    loss: Loss
    weight: float
    alike: bool = False

    def __call__(self, outputs: Sequence[torch.Tensor], wanted: Wanted) -> torch.Tensor:
        """Return the weighted loss.

        Raises:
            DataError: the two are of other shapes on this batch.
        """
        target = outputs[self.taught].detach() if self.by == "student" else wanted[self.by][self.taught]
        found = outputs[self.index]
        if len(found) != len(target) or (self.alike and found.shape != target.shape):
            raise DataError(
                f"Of `{self.name}` the student gives {list(found.shape)} for this batch, and what teaches it "
                f"{list(target.shape)}. Give both the same samples, of the same sizes."
            )
        return self.weight * self.loss(found, target)


@dataclass(frozen=True)
class LabelTerm:
    """The loss of one output against the labels.

    Attributes:
        name: what it is called.
        column: of a batch, that holds the labels: behind the student's inputs.
        loss: of the output and its labels.
        weight: of the loss.
        counted: whether the last column says how many labels there are for a sample of the whole batch.
    """

    name: str
    column: int
    loss: LabelLoss
    weight: float
    counted: bool = False

    def __call__(self, outputs: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor:
        """Return the weighted loss."""
        density = batch[-1] if self.counted else None
        return self.weight * self.loss(outputs[self.loss.target.index], batch[self.column], density)


@dataclass
class Teaching:
    """What a student learns from teachers and labels.

    Attributes:
        own: how many columns of a batch are the student's inputs and the labels.
        readers: the teachers, as far as they are read.
        places: which columns of a batch each of them takes.
        outputs: the outputs that are taught.
        pairs: the values inside that are, and the heads on them.
        labels: what the labels say of an output; None without them.
        heads: what they say of heads.
        cached: whether the columns hold what the teachers say, not what they take.
    """

    own: int
    readers: Sequence[Reader]
    places: Sequence[Sequence[int]]
    outputs: Sequence[Term]
    pairs: Sequence[Term]
    labels: LabelTerm | None = None
    heads: Sequence[LabelTerm] = ()
    cached: bool = False

    @property
    def columns(self) -> int:
        """How many columns a batch has: the student's inputs, the labels, then inputs of teachers of their own."""
        return max([self.own, *(at + 1 for place in self.places for at in place)])

    def copied(self) -> Teaching:
        """Return the lesson by teachers with tensors of their own."""
        return dataclasses.replace(self, readers=[reader.copied() for reader in self.readers])

    def place(self, device: torch.device) -> None:
        """Move the teachers."""
        for reader in self.readers:
            reader.place(device)

    def wanted(self, batch: Batch) -> Wanted:
        """Return what each teacher says of a batch."""
        if self.cached:
            return [_columns(batch, place) for place in self.places]
        pairs = zip(self.readers, self.places, strict=True)
        return [reader.call(_columns(batch, place)) for reader, place in pairs]

    def terms(self, outputs: Sequence[torch.Tensor], wanted: Wanted, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the weighted parts of the loss by name."""
        found = self._judging(outputs, wanted, batch)
        for term in self.pairs:
            name, value = term.name, term(outputs, wanted)
            found[name] = found[name] + value if name in found else value
        return found | {head.name: head(outputs, batch) for head in self.heads}

    def loss(self, outputs: Sequence[torch.Tensor], wanted: Wanted, batch: Batch) -> torch.Tensor:
        """Return the sum of all terms."""
        return torch.stack([*self.terms(outputs, wanted, batch).values()]).sum()

    def judged(self, outputs: Sequence[torch.Tensor], wanted: Wanted, batch: Batch) -> torch.Tensor:
        """Return what outputs and labels say; what the pairs do, where there are neither."""
        found = self._judging(outputs, wanted, batch) or self.terms(outputs, wanted, batch)
        return torch.stack([*found.values()]).sum()

    def _judging(self, outputs: Sequence[torch.Tensor], wanted: Wanted, batch: Batch) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for term in self.outputs:
            name, value = f"output {term.name}", term(outputs, wanted)
            found[name] = found[name] + value if name in found else value
        if self.labels is not None:
            found[self.labels.name] = self.labels(outputs, batch)
        return found

    def relabelled(self, change: Callable[[LabelTerm], LabelTerm]) -> Teaching:
        """Return the lesson with other terms of labels."""
        labels = None if self.labels is None else change(self.labels)
        return dataclasses.replace(self, labels=labels, heads=[*map(change, self.heads)])

    def remembered(self, pools: Sequence[Pool], batch_size: int, device: torch.device) -> tuple[Teaching, list[Pool]]:
        """Ask the teachers once for all samples and keep what they say as columns, if that is not too much to hold.

        Args:
            pools: whose samples; no view may change them.
            batch_size: samples asked about at once.
            device: where the teachers are.

        Returns:
            The lesson and the pools that go together.
        """
        sample = pools[0].take((0, torch.arange(min(2, batch_count(pools[0].buckets[0])))))
        said = self._flat(self.wanted(_on(sample, device)))
        size = sum(answer.numel() * answer.element_size() for answer in said) / batch_count(sample)
        apart = any(not answer.dim() or len(answer) != batch_count(sample) for answer in said)
        if not said or apart or size * sum(pool.count for pool in pools) > _MOST_CACHED:
            return self, list(pools)

        def with_answers(bucket: Batch) -> Batch:
            starts = range(0, batch_count(bucket), batch_size)
            pieces = (taken(bucket, slice(start, start + batch_size)) for start in starts)
            answers = [self._flat(self.wanted(_on(piece, device))) for piece in pieces]
            return *bucket[: self.own], *(torch.cat(parts).cpu() for parts in zip(*answers, strict=True))

        found = [Pool(tuple(map(with_answers, pool.buckets))) for pool in pools]
        places, start = [], self.own
        for answers in self.wanted(_on(sample, device)):
            places.append(range(start, start := start + len(answers)))
        return dataclasses.replace(self, places=places, cached=True), found

    @staticmethod
    def _flat(wanted: Wanted) -> Batch:
        return tuple(answer for answers in wanted for answer in answers)


def _columns(batch: Batch, places: Sequence[int]) -> Batch:
    return tuple(batch[at] for at in places)


def _on(batch: Batch, device: torch.device) -> Batch:
    return tuple(part.to(device) for part in batch)
