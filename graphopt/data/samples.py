"""`Samples`: data as tuples of tensors in the model's input order, as often and in as small pieces as wanted."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from graphopt.data.batches import Batch, Labelled, batch_count, rebatched
from graphopt.data.binding import Bound, bind
from graphopt.data.fitting import check_shape, describe, fit
from graphopt.data.input_spec import Spec
from graphopt.data.sources import Source, open_source
from graphopt.errors import DataError
from graphopt.ir.signature import TensorSpec, size_out_of_range
from graphopt.ir.sizes import ANY

log = logging.getLogger(__name__)

# Samples read at once where the caller asks for no particular size.
READ_SIZE = 256
_CHECKED_AT_ONCE = 32


class Samples:
    """Samples for a model, re-iterable, read as they are needed.

    Attributes:
        names: The inputs that the data has, in the model's order.
        notes: What was converted or left aside, one sentence each, in the order it was met.
    """

    def __init__(self, source: Source, names: Sequence[str] | None, required: int | None) -> None:
        """Use `Samples.open`."""
        self._source = source
        self._wanted = None if names is None else tuple(names)
        self._required = required
        self._specs: tuple[Spec, ...] | None = None
        self._device = torch.device("cpu")
        self.notes: list[str] = []
        first = next(self._bound(), None)
        if first is None:
            raise DataError("The data holds no batches.")
        self.names = first.names
        if first.count == 0 and self.count == 0:
            raise DataError(f"{first.where[:1].upper()}{first.where[1:]} holds no samples.")

    @classmethod
    def open(cls, source: Any, names: Sequence[str] | None = None, *, required: int | None = None) -> Samples:
        """Open data of any kind; reads no more than the first batch, and of files the headers.

        >>> samples = Samples.open(torch.ones(5, 3), ["x"])
        >>> [batch[0].shape[0] for batch in samples.batches(2)]
        [2, 2, 1]

        Args:
            source: A tensor or array (first axis: samples); a tuple or dict of them for several inputs; an
                iterable of batches (a batch is a tensor, a tuple, list or dict of them, or a pair of such and
                labels); or a path: `.npz`, `.npy`, `.safetensors`, a folder of them, `module:function` that
                yields batches. In a tuple, one array more than the model has inputs is taken as labels; by name,
                `labels`, `label`, `y`, `targets` or `target` are. Samples opened before are bound to these names
                instead; what they drew of a one-shot iterator is not lost.
            names: The model's inputs, in order; None takes the data's own.
            required: How many of `names` must be given; the rest are optional arguments of the model.

        Raises:
            DataError: The data cannot be read, or has other names or numbers of arrays than the model.
            UsageError: There is no such function.
        """
        if isinstance(source, Samples):
            return cls(source._source, names, required)
        return cls(open_source(source, names or ()), names, required)

    @property
    def count(self) -> int | None:
        """How many samples there are; None where only going through them would tell."""
        return sum(bound.count for bound in self._bound()) if self._source.sized else None

    @property
    def labels(self) -> torch.Tensor | None:
        """The labels of all samples, shape (samples, ...); None where the data has none."""
        if self._source.sized:
            pieces = [bound.labels.read(0, bound.count) if bound.labels else None for bound in self._bound()]
        else:
            pieces = [labels for _, labels in self._pieces(READ_SIZE, None, with_labels=True)]
        found = [piece for piece in pieces if piece is not None]
        return torch.cat(found) if found and len(found) == len(pieces) else None

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """Yield tuples of tensors of `batch_size` samples, in the data's order; the last may hold fewer.

        Batches of unlike shapes (text padded to its own batch's length) are not joined: then a batch may also
        end early.

        Args:
            batch_size: Samples per batch, at least 1.
            limit: Stop after this many samples.
        """
        for inputs, _ in rebatched(self._pieces(batch_size, limit, with_labels=False), batch_size):
            yield inputs

    def labelled_batches(self, batch_size: int, limit: int | None = None) -> Iterator[Labelled]:
        """Yield pairs of inputs and labels as `batches` does; labels are None where the data has none."""
        return rebatched(self._pieces(batch_size, limit, with_labels=True), batch_size)

    def first(self, count: int) -> Batch:
        """Return the first `count` samples (or all, if there are fewer) as one batch."""
        batch = next(self.batches(count, count), None)
        if batch is None:
            raise DataError("The data holds no samples.")
        return batch

    def first_batch(self) -> Batch:
        """Return the first batch in the size it comes in; of an array all samples, of a long one the first."""
        pieces = self._pieces(READ_SIZE, READ_SIZE, with_labels=False)
        return next(inputs for inputs, _ in pieces if batch_count(inputs))

    def check(self, specs: Sequence[Spec], limit: int | None = READ_SIZE) -> Samples:
        """Check the data against a model's inputs, and from now on every batch as it is read.

        Args:
            specs: What the model takes, in order.
            limit: How many samples to look at now; None looks at all.

        Returns:
            These samples; what is read of them from now on has the dtypes of `specs`.

        Raises:
            DataError: An input is missing, or rank, size, dtype or values of one do not fit.
        """
        missing = [spec for spec in specs if spec.name not in self.names]
        if missing:
            listed = ", ".join(f"`{spec.name}` ({describe(spec)})" for spec in missing)
            has = ", ".join(f"`{name}`" for name in self.names)
            raise DataError(f"The data lacks the model's input {listed}; it has {has}.")
        self._wanted = tuple(spec.name for spec in specs)
        self._specs = tuple(specs)
        self.names = self._wanted
        for _ in self._pieces(_CHECKED_AT_ONCE, limit, with_labels=False):
            pass
        return self

    def on(self, device: torch.device) -> Samples:
        """Return these samples with batches that lie on a device, each as it is read, their labels too."""
        samples = copy.copy(self)
        samples._device, samples.notes = device, [*self.notes]
        return samples

    def _bound(self) -> Iterator[Bound]:
        """Yield the chunks, matched to the inputs; every chunk must have what the first had."""
        expected: tuple[str, ...] | None = None
        for chunk in self._source.chunks():
            bound = bind(chunk, self._wanted, self._required)
            if expected is not None and bound.names != expected:
                raise DataError(f"The inputs of {bound.where} are {bound.names}; those before it had {expected}.")
            expected = bound.names
            self._note(bound.note)
            yield bound

    def _pieces(self, size: int, limit: int | None, with_labels: bool) -> Iterator[Labelled]:
        """Yield what is read at once: at most `size` samples of one chunk, checked."""
        if size < 1:
            raise DataError(f"A batch of {size} samples is empty; ask for at least 1.")
        left = limit
        for bound in self._bound():
            pairs = list(zip(bound.inputs, self._specs or (), strict=self._specs is not None))
            beside = [(column.shape, spec) for column, spec in pairs]
            for column, spec in pairs:
                check_shape(column.shape, column.dtype_name, spec, bound.where, is_batch=bound.is_batch, beside=beside)
            stop = bound.count if left is None else min(bound.count, left)
            for start in range(0, stop, size):
                end = min(start + size, stop)
                inputs = tuple(column.read(start, end) for column in bound.inputs)
                labels = bound.labels.read(start, end) if with_labels and bound.labels else None
                fitted = tuple(tensor.to(self._device) for tensor in self._fit(inputs, bound, start))
                yield fitted, None if labels is None else labels.to(self._device)
            left = None if left is None else left - stop
            if left == 0:
                return

    def _fit(self, inputs: Batch, bound: Bound, start: int) -> Batch:
        if self._specs is None:
            return inputs
        fitted = []
        sizes: dict[str, tuple[int, str]] = {}
        for tensor, spec in zip(inputs, self._specs, strict=True):
            result, note = fit(tensor, spec, bound.where, start)
            self._note(note)
            fitted.append(result)
            others = spec.ranges[1:] if isinstance(spec, TensorSpec) else ()
            if wrong := size_out_of_range(spec.name, (ANY, *others), tensor.shape):
                raise DataError(f"{wrong} Leave out what {bound.where} has of that size.")
            for size, axis in zip(tensor.shape[1:], spec.shape[1:], strict=True):
                known, owner = sizes.setdefault(axis, (size, spec.name)) if isinstance(axis, str) else (size, "")
                if known != size:
                    raise DataError(
                        f"Inputs `{owner}` and `{spec.name}` must have the same size along `{axis}`, but {bound.where} "
                        f"has {known} and {size}."
                    )
        return tuple(fitted)

    def _note(self, text: str | None) -> None:
        if text and text not in self.notes:
            self.notes.append(text)
            log.info("%s", text)
