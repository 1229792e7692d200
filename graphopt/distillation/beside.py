"""Samples with what lies beside them, labels and the inputs of teachers, as further columns of their batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from graphopt.data.batches import Batch, Labelled, SampleSource, batch_count
from graphopt.errors import DataError


@dataclass(frozen=True)
class Beside:
    """Samples whose batches hold the student's inputs, then labels, then inputs of teachers of their own.

    Attributes:
        samples: the student's inputs.
        labels: of all samples in their order; None: those of `samples`.
        labelled: whether there is a column of labels.
        others: sample by sample the same, for the teachers.
    """

    samples: SampleSource
    labels: torch.Tensor | None = None
    labelled: bool = False
    others: Sequence[SampleSource] = ()

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """Yield batches of at most `batch_size` samples, `limit` samples in all.

        Raises:
            DataError: what lies beside is not as many, or of some samples there are no labels.
        """
        first = 0
        streams = [other.batches(batch_size, limit) for other in self.others]
        for inputs, labels in self.samples.labelled_batches(batch_size, limit):
            count = batch_count(inputs)
            columns = [*inputs]
            if self.labelled:
                columns.append(self._labels(labels, first, count))
            for stream in streams:
                found = next(stream, ())
                if batch_count(found) != count or not found:
                    raise DataError(
                        f"The teacher's data does not go with the student's: from sample {first} on there are not as "
                        "many. Give both the same samples in the same order, in batches of the same sizes."
                    )
                columns += found
            yield tuple(columns)
            first += count
        if limit is None and self.labels is not None and len(self.labels) > first:
            raise DataError(f"There are {len(self.labels)} labels for {first} samples. Give a label for each.")

    def labelled_batches(self, batch_size: int, limit: int | None = None) -> Iterator[Labelled]:
        """Yield the batches; what labels there are is a column of them."""
        return ((batch, None) for batch in self.batches(batch_size, limit))

    def _labels(self, own: torch.Tensor | None, first: int, count: int) -> torch.Tensor:
        if self.labels is None:
            if own is None:
                raise DataError(f"Sample {first} of the data has no label, and others have. Give labels of all.")
            return own
        if len(self.labels) < first + count:
            raise DataError(f"There are {len(self.labels)} labels, and more samples. Give a label for each.")
        return self.labels[first : first + count]
