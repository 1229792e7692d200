"""How far the outputs of two programs, or of a program and its artifact, are apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from graphopt.data.batches import Batch
from graphopt.errors import VerifyError
from graphopt.ir.program import Program
from graphopt.ir.signature import TensorSpec


@dataclass(frozen=True, slots=True)
class Equivalence:
    """How far the outputs of two programs are apart on the same inputs.

    Attributes:
        max_error: largest absolute difference over all floating outputs; over all others where there is none.
        relative: `max_error` of each output over its largest magnitude, the worst of them.
        sqnr: signal power over error power in dB, the worst output; inf when equal.
        agreement: share of rows whose largest entry is at the same place, where the first output looks like logits
            (floating, rank >= 2, last axis of at least 2); None otherwise.
    """

    max_error: float
    relative: float
    sqnr: float
    agreement: float | None


FlatCallable = Callable[[Batch], Batch]


def measure(reference: Program, candidate: FlatCallable, batch: Batch) -> Equivalence:
    """Run a program and a candidate on the same flat inputs and compare the outputs they share, in order.

    Args:
        reference: what the candidate should compute.
        candidate: takes flat inputs and returns flat outputs: `Program.call_flat`, or a session.
        batch: flat inputs.

    Raises:
        VerifyError: an output is not finite where the reference is.
    """
    with torch.no_grad():
        return compare_outputs(reference.outputs, reference.call_flat(batch), candidate(batch))


class Probe:
    """Inputs on which many candidates are compared with one program, which runs on them once."""

    def __init__(self, reference: Program, batch: Batch) -> None:
        self.batch = batch
        self._specs = reference.outputs
        with torch.no_grad():
            self._wanted = reference.call_flat(batch)

    def measure(self, candidate: FlatCallable) -> Equivalence:
        """Run a candidate and compare it with the reference.

        Raises:
            VerifyError: an output is not finite where the reference is.
        """
        with torch.no_grad():
            return compare_outputs(self._specs, self._wanted, candidate(self.batch))


def compare_outputs(specs: Sequence[TensorSpec], wanted: Batch, found: Batch) -> Equivalence:
    """Compare flat outputs, those that both have, in order.

    Raises:
        VerifyError: an output is not finite where the reference is.
    """
    pairs = list(zip(specs, wanted, found, strict=False))
    numbers = [pair for pair in pairs if pair[1].is_floating_point()]  # a class or place is not "off by" anything
    each = [_compare(spec.name, want, got) for spec, want, got in numbers or pairs]
    return Equivalence(
        max((e.max_error for e in each), default=0.0),
        max((e.relative for e in each), default=0.0),
        min((e.sqnr for e in each), default=math.inf),
        _agreement(wanted[0], found[0]) if wanted and found else None,
    )


def _agreement(want: torch.Tensor, got: torch.Tensor) -> float | None:
    if not want.is_floating_point() or want.dim() < 2 or want.shape[-1] < 2:
        return None
    same = want.argmax(-1) == got.argmax(-1)
    return float(same.double().mean())


def _compare(name: str, want: torch.Tensor, got: torch.Tensor) -> Equivalence:
    want64, got64 = want.double(), got.double()
    if bool(torch.isfinite(want64).all()) and not bool(torch.isfinite(got64).all()):
        raise VerifyError(f"Output `{name}` is NaN or infinite where the original is finite.")
    if want64.numel() == 0:
        return Equivalence(0.0, 0.0, math.inf, None)
    # equal infinities (masked scores) are no error
    difference = torch.where(want64 == got64, 0.0, want64 - got64)
    finite = torch.where(torch.isfinite(want64), want64, 0.0)
    error, scale = float(difference.abs().max()), float(finite.abs().max())
    noise, signal = float(difference.square().sum()), float(finite.square().sum())
    sqnr = math.inf if noise == 0 else 10 * (math.log10(max(signal, 1e-300)) - math.log10(noise))
    return Equivalence(error, error / scale if scale else (0.0 if error == 0 else math.inf), sqnr, None)
