"""Which calibration samples can say what a pruned program should give: those of which the original's outputs can.

NaN is an error in the data. Infinity in a few samples is an overflow, and they are left out; in many it is how a model
masks what does not count, and they stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from graphopt.data.batches import Batch, SampleSource, batch_count, taken
from graphopt.data.split import place
from graphopt.errors import DataError
from graphopt.ir.finite import computable
from graphopt.ir.program import Program
from graphopt.ir.signature import TensorSpec
from graphopt.pipeline.plan import Refusal

_FEW = 1 / 8  # of the samples


def usable(original: Program, samples: SampleSource, batches: Sequence[Batch]) -> tuple[list[Batch], list[Refusal]]:
    """Return the batches of `samples` without what makes an output of `original` infinite, and a line about it.

    Raises:
        DataError: a sample holds NaN, or makes an output NaN.
    """
    finite: list[torch.Tensor] = []  # by batch, (samples,)
    first = 0
    for batch in batches:
        _refuse_nan(original.inputs, batch, samples, first, batch_count(batch), "holds NaN in input")
        with torch.no_grad():
            outputs = original.call_flat([tensor.clone() for tensor in batch])  # a program may write to its inputs
        does = "makes the unpruned program give NaN in output"
        _refuse_nan(original.outputs, outputs, samples, first, batch_count(batch), does)
        finite.append(~_samples_with(torch.isinf, outputs, batch_count(batch)))
        first += batch_count(batch)
    overflown = (~torch.cat(finite)).nonzero().flatten().tolist() if finite else []
    if not overflown or len(overflown) > _FEW * first:
        return list(batches), []
    chosen = _without(original, batches, finite)
    lost = first - sum(batch_count(batch) for batch in chosen)
    text = f"left out {lost} of {first} samples: number {place(samples, overflown[0])} makes an output infinite"
    return chosen, [Refusal("compensation", text, "samples with infinite outputs left out")]


def _without(original: Program, batches: Sequence[Batch], finite: Sequence[torch.Tensor]) -> list[Batch]:
    """Leave out samples; of a program that takes no such number whole batches."""
    chosen = [taken(batch, rows) for batch, rows in zip(batches, finite, strict=True)]
    return [batch for batch in chosen if original.takes(batch_count(batch)) == batch_count(batch)]


def _refuse_nan(
    specs: Sequence[TensorSpec], tensors: Batch, samples: SampleSource, first: int, count: int, does: str
) -> None:
    for spec, tensor in zip(specs, tensors, strict=False):
        bad = _samples_with(torch.isnan, (tensor,), count)
        if bool(bad.any()):
            raise DataError(
                f"Calibration sample {place(samples, first + int(bad.nonzero()[0]))} {does} `{spec.name}`, and pass "
                "`prune` refits layers to what that program gives. Leave out such samples, check that they are scaled "
                "as in training, or give compensate=no."
            )


def _samples_with(is_bad: Callable[[torch.Tensor], torch.Tensor], tensors: Batch, count: int) -> torch.Tensor:
    """Tell of each sample whether a value is bad; all are blamed for a tensor that has no axis of samples."""
    found = torch.zeros(count, dtype=torch.bool)
    for tensor in tensors:
        if tensor.is_floating_point():
            bad = is_bad(computable(tensor))
            apart = tensor.dim() > 0 and len(tensor) == count
            found |= bad.reshape(count, -1).any(1).cpu() if apart else bad.any().cpu()
    return found
