"""How far the outputs of two programs, or of a program and its artifact, are apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from graphopt.data.batches import Batch, batch_count
from graphopt.errors import CaptureError, DataError, VerifyError, foreign_code
from graphopt.ir.finite import computable
from graphopt.ir.program import Program
from graphopt.ir.signature import TensorSpec
from graphopt.measure.decibels import decibels


@dataclass(frozen=True, slots=True)
class Equivalence:
    """How far the outputs of two programs are apart on the same inputs.

    Attributes:
        max_error: largest absolute difference over all floating outputs; over all others where there is none.
        relative: the worst output: of numbers the largest difference over the largest magnitude, of integers and
            booleans, which are classes and places, the share of elements that differ; inf where an output is missing or
            of another shape.
        sqnr: signal power over error power in dB, the worst output, each element of an integer one right or wrong; inf
            when equal.
        agreement: share of rows whose largest entry is at the same place, where the first output looks like logits
            (floating, rank >= 2, last axis of at least 2); None otherwise.
        differs: what is not a matter of degree: outputs missing, too many, of another shape or type.
        of_integers: whether the worst output is one of integers or booleans, so that `relative` is a share of elements.
    """

    max_error: float
    relative: float
    sqnr: float
    agreement: float | None
    differs: tuple[str, ...] = ()
    of_integers: bool = False


_LARGEST = 300.0  # power of ten of an error over outputs that are all zero
_NUDGES = 16  # runs on moved inputs: of two equal values, either comes first in half of them
_NOTHING = Equivalence(0.0, 0.0, math.inf, None)
_INCOMPARABLE = Equivalence(math.inf, math.inf, -math.inf, None)

FlatCallable = Callable[[Batch], Batch]


def measure(
    reference: Program,
    candidate: FlatCallable,
    batch: Batch,
    *,
    declared: Sequence[TensorSpec] | None = None,
    settled: bool = False,
) -> Equivalence:
    """Run a program and a candidate on the same flat inputs and compare their outputs, in order.

    Args:
        reference: what the candidate should compute.
        candidate: takes flat inputs and returns flat outputs: `Program.call_flat`, or a session.
        batch: flat inputs.
        declared: the outputs of the candidate's own program, of which passes may have added or removed the last; what
            both programs declare is compared. None: those of the reference.
        settled: whether to pass over integers that the reference itself gives when its inputs move in their last
            digits: rounding decides which of two equal values is the larger.

    Raises:
        VerifyError: an output is not finite where the reference is.
    """
    probe = Probe(reference, batch)
    return probe.measure(probe.settling(candidate) if settled else candidate, declared=declared)


class Probe:
    """Inputs on which many candidates are compared with one program, which runs on them once.

    Raises:
        CaptureError: the program fails on them.
    """

    def __init__(self, reference: Program, batch: Batch) -> None:
        self.batch = batch
        self._reference = reference.evaluated()

        def failed(said: str, _: BaseException) -> CaptureError:
            inputs = ", ".join(map(str, reference.inputs))
            return CaptureError(
                f"The program fails on {batch_count(batch)} of the samples, though it says it takes {inputs}: "
                f"{said}. If it takes no other number of them than it was captured with, capture it so "
                f"(dynamic_shapes={{'{reference.inputs[0].name}': {{0: None}}}}); otherwise leave out what it fails on."
            )

        with torch.no_grad(), foreign_code(failed):
            self._wanted = self._reference.call_flat(batch)

    @property
    def undefined(self) -> bool:
        """Whether an output of the reference holds NaN, which no candidate can be held against."""
        return any(bool(tensor.isnan().any()) for tensor in self._wanted)

    @property
    def unbounded(self) -> int:
        """In how many samples an output of the reference holds NaN or infinity: errors are of the others."""
        outputs = [computable(one) for one in self._wanted if one.is_floating_point() and one.dim() and len(one)]
        bad = [~one.isfinite().reshape(len(one), -1).all(1) for one in outputs if len(one) == batch_count(self.batch)]
        return int(torch.stack(bad).any(0).sum()) if bad else 0

    def measure(self, candidate: FlatCallable, *, declared: Sequence[TensorSpec] | None = None) -> Equivalence:
        """Run a candidate and compare it with the reference, in what both declare (see `measure`).

        Raises:
            VerifyError: an output is not finite where the reference is.
        """
        with torch.no_grad():
            found = candidate(self.batch)
            specs = self._reference.outputs
            if declared is not None and len(found) == len(declared):
                found = found[: len(specs)]
            count = len(specs) if declared is None else min(len(specs), len(declared))
            return compare_outputs(specs[:count], self._wanted[:count], found)

    def settling(self, candidate: FlatCallable) -> FlatCallable:
        """Return a candidate that agrees with the reference on every integer which that gives as well, when nudged."""

        def call(batch: Batch) -> Batch:
            found = list(candidate(batch))
            places = [
                index
                for index, (want, got) in enumerate(zip(self._wanted, found, strict=False))
                if not _is_number(want) and want.shape == got.shape
            ]
            for seed in range(_NUDGES if any(map(_is_number, batch)) else 0):
                places = [index for index in places if not torch.equal(self._wanted[index], found[index])]
                if not places:
                    break
                moved = self._reference.call_flat(_nudged(batch, seed))
                for index in places:
                    want, got = self._wanted[index], found[index]
                    if moved[index].shape == want.shape:
                        found[index] = torch.where(moved[index] == got, want.to(got.dtype), got)
            return tuple(found)

        return call


class OutputError:
    """Measures how far programs are from one they come from, on the same batches.

    Args:
        reference: the program that is right.
        batches: what it is run on, once.
    """

    def __init__(self, reference: Program, batches: Sequence[Batch]) -> None:
        self._probes = [Probe(reference, batch) for batch in batches]

    def of(self, candidate: FlatCallable) -> float:
        """Return the power of the error over that of the outputs, mean of the batches; infinite if not finite.

        Raises:
            DataError: the outputs of the reference hold NaN, so that nothing can be told.
        """
        if any(probe.undefined for probe in self._probes):
            raise DataError(not_finite("an output of the program"))
        try:
            ratios = [probe.measure(candidate).sqnr for probe in self._probes]
        except VerifyError:  # NaN or infinite where the reference is not
            return math.inf
        return sum(10 ** min(-ratio / 10, _LARGEST) for ratio in ratios) / len(ratios)


def not_finite(what: str) -> str:
    """Say that data lead to numbers by which nothing can be chosen."""
    return (
        f"The calibration data makes {what} NaN or infinite. Leave out the samples that do, or check that they are "
        "scaled as in training."
    )


def _nudged(batch: Batch, seed: int) -> Batch:
    """Return inputs each of whose numbers is changed by a few units in the last place."""
    generator = torch.Generator().manual_seed(seed)

    def nudged(tensor: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(tensor.shape, generator=generator).to(tensor.device, tensor.dtype) * 16 - 8
        return tensor * (1 + noise * torch.finfo(tensor.dtype).eps)

    return tuple(nudged(tensor) if tensor.is_floating_point() else tensor for tensor in batch)


def compare_outputs(specs: Sequence[TensorSpec], wanted: Batch, found: Batch) -> Equivalence:
    """Compare flat outputs, in order; `specs` names those that are wanted.

    Raises:
        VerifyError: an output is not finite where the reference is.
    """
    pairs = list(zip(specs, wanted, found, strict=False))
    differs = [
        f"output `{spec.name}` is {_described(got)} instead of {_described(want)}"
        for spec, want, got in pairs
        if want.shape != got.shape or want.dtype != got.dtype
    ]
    differs += [f"output `{spec.name}` is missing" for spec in specs[len(found) :]]
    if len(found) > len(wanted):
        differs.append(f"there are {len(found)} outputs, not {len(wanted)}")
    each = [_compare(*pair) for pair in pairs]
    numbers = [one for one, (_, want, _) in zip(each, pairs, strict=True) if _is_number(want)] or each
    if len(found) != len(wanted):
        each, numbers = [*each, _INCOMPARABLE], [*numbers, _INCOMPARABLE]
    worst = max(each, key=lambda e: (e.relative, not e.of_integers), default=_NOTHING)
    return Equivalence(
        max((e.max_error for e in numbers), default=0.0),
        worst.relative,
        min((e.sqnr for e in each), default=math.inf),
        _agreement(wanted[0], found[0]) if wanted and found else None,
        tuple(differs),
        worst.of_integers,
    )


def _is_number(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()  # a class or place is not "off by" anything


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {'x'.join(map(str, tensor.shape)) or '()'}"


def _agreement(want: torch.Tensor, got: torch.Tensor) -> float | None:
    if not want.is_floating_point() or want.shape != got.shape or want.dim() < 2 or want.shape[-1] < 2:
        return None
    same = computable(want).argmax(-1) == computable(got).argmax(-1)
    return float(same.double().mean()) if same.numel() else None


def _compare(spec: TensorSpec, want: torch.Tensor, got: torch.Tensor) -> Equivalence:
    if want.shape != got.shape:
        return _INCOMPARABLE
    if want.numel() == 0:
        return _NOTHING
    if not _is_number(want):
        differing = want != got
        wrong, error = float(differing.double().mean()), float((want.double() - got.double()).abs().max())
        return Equivalence(error, wrong, decibels(1.0, wrong), None, of_integers=True)
    want, got = (
        computable(tensor).to(torch.complex128 if tensor.is_complex() else torch.float64) for tensor in (want, got)
    )
    if bool((torch.isfinite(want) & ~torch.isfinite(got)).any()):
        raise VerifyError(f"Output `{spec.name}` is NaN or infinite where the original is finite.")
    # equal infinities (masked scores) are no error, nor is what is undefined in both
    equal = (want == got) | (want.isnan() & got.isnan())
    difference = torch.where(equal, 0.0, (want - got).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    size = torch.where(torch.isfinite(want), want.abs(), 0.0)
    error, scale = float(difference.max()), float(size.max())
    noise, signal = float(difference.square().sum()), float(size.square().sum())
    sqnr = decibels(max(signal, 1e-300), noise)
    return Equivalence(error, error / scale if scale else (0.0 if error == 0 else math.inf), sqnr, None)
