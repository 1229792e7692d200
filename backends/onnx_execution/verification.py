"""Reload an artifact, run it at several sizes of its dynamic axes and compare it with the program.

Without integers: outputs agree to float tolerance (`agreement`). With integers, in three steps that leave nothing to
accumulate and nothing to trust:

1. A copy of the file that also returns the integers of every quantization runs beside the artifact. Its outputs
   are those of the artifact, bit for bit, so its integers are the artifact's.
2. The program is run piece by piece from those integers (`replay`); each piece must arrive within one step of the
   next.
3. From the last integers on, outputs agree to float tolerance.

Where kernels round activations that are floating in the program, a copy that does not is verified so, and the artifact
may be as far from that as the rounding explains (`rounded_activations`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch

from graphopt.backends.onnx_execution.agreement import (
    WORSE_THAN_TORCH,
    Reference,
    disagreements,
    half_of_the_digits,
    relative_error,
)
from graphopt.backends.onnx_execution.batches import batches
from graphopt.backends.onnx_execution.blame import skip_around, value_computed, value_quantized
from graphopt.backends.onnx_execution.empty_inputs import check_on_zeros
from graphopt.backends.onnx_execution.lstm_twins import add_twins
from graphopt.backends.onnx_execution.other_sizes import other_sizes
from graphopt.backends.onnx_execution.replay import Codes, Deviation, Drift, Replay, perturbed, quantize_nodes, takes
from graphopt.backends.onnx_execution.rounded_activations import RoundedActivations, multiplies_blocks, without_rounding
from graphopt.backends.onnx_execution.session import OnnxSession, SessionSettings
from graphopt.backends.onnx_lowering.exporter import QUANTIZERS, SOURCE_PROPERTY
from graphopt.errors import LoweringError, foreign_code
from graphopt.ir.program import Program
from graphopt.targets.backend import Array, Session

_ALLOWED_STEPS = 1  # a value half-way between two integers may be rounded either way

Tensors = tuple[torch.Tensor, ...]


def verify(
    path: Path,
    program: Program,
    inputs: Sequence[Array] | None,
    settings: SessionSettings,
    session: Session | None = None,
) -> float:
    """Compare the artifact at `path` with `program`; return the largest relative error of an output.

    The error is end to end; with integers that of the smallest batch, since rounding adds up in any.

    Args:
        path: the artifact.
        program: what it must compute.
        inputs: realistic inputs, the program's examples if None.
        settings: the session options to verify.
        session: the artifact, loaded with them; None to load it.

    Raises:
        LoweringError: the runtime refuses the artifact, or an output or an integer on the way is wrong; the message
            names it.
    """
    if not isinstance(session, OnnxSession):
        session = OnnxSession(path, settings)
    _check_signature(session, program, path)
    exact, probe = session, None
    if rounds := multiplies_blocks(program):
        exact = OnnxSession(without_rounding(path).SerializeToString(), settings, folder=path.parent)
    if quantize_nodes(program):
        probe = IntegerProbe(without_rounding(path), path, program, settings)
    replay = Replay(program)
    worst = 0.0
    for index, (where, remedy, arrays) in enumerate(_sizes(program, inputs)):
        if not index:
            check_on_zeros(exact, program, arrays, path.name)
        feed = tuple(torch.from_numpy(array) for array in arrays)
        failed = functools.partial(_not_run, program, where)
        try:
            found = exact(*arrays)
        except LoweringError as err:
            with foreign_code(failed):  # in the program, first of all
                replay.outputs(feed)
            raise LoweringError(f"{err}. The program runs {where}; the artifact may {remedy}.") from err
        codes = probe.codes(arrays, found) if probe else {}
        with foreign_code(failed):
            wanted = replay.outputs(feed, codes)
        reference = _reference(program, codes, feed, wanted)
        got = tuple(torch.from_numpy(array) for array in found)
        _check_steps(program, replay.steps, where)
        _check_drifts(program, replay.drifts, where)
        for wrong in disagreements(reference, got):
            raise LoweringError(
                f"{path.name} computes something else than the program: output `{program.outputs[wrong.output].name}` "
                f"{wrong.text}, {where}. Please report the model; it may "
                f"{'work without int8, or ' if probe else ''}{remedy}."
            )
        if rounds or not codes or not index:
            plain = replay.outputs(feed) if codes else reference.wanted
            if rounds:
                got = tuple(torch.from_numpy(array) for array in session(*arrays))
                _check_rounding(program, feed, plain, got, f"{path.name}, {where}")
            pairs = zip(plain, got, strict=True)
            worst = max([worst, *(relative_error(want, have) for want, have in pairs if want.is_floating_point())])
    return worst


def _sizes(program: Program, inputs: Sequence[Array] | None) -> Iterator[tuple[str, str, tuple[Array, ...]]]:
    """Yield what to verify on: batches, then other sizes of other axes as far as the program takes them."""
    for where, arrays in batches(program, inputs):
        yield where, "work for another target", arrays
    for sized in other_sizes(program, inputs):
        taken = next(((where, arrays) for where, arrays in sized if takes(program, arrays)), None)
        if taken is not None:
            bound = "bound to the sizes it needs (--dynamic INPUT:AXIS:MIN-MAX, or Dim(.., min=.., max=..))"
            yield taken[0], f"work with that axis of one size, or {bound}", taken[1]


def _not_run(program: Program, where: str, said: str, _: BaseException) -> LoweringError:
    first = next((spec.name for spec in program.inputs if spec.batched), "x")
    return LoweringError(
        f"The program itself does not run {where}, which it was captured for: {said}. Bind the sizes that it takes "
        f'where it is captured or exported: --dynamic {first}:0:MIN-MAX, or dynamic_shapes={{"{first}": {{0: '
        'Dim("batch", min=..., max=...)}}.'
    )


class IntegerProbe:
    """The artifact with the integers of its quantizations as further outputs."""

    def __init__(self, model: onnx.ModelProto, path: Path, program: Program, settings: SessionSettings) -> None:
        known = set(quantize_nodes(program))
        self._values: dict[str, list[str]] = {}  # program node: ONNX values
        for node in model.graph.node:
            source = next((entry.value for entry in node.metadata_props if entry.key == SOURCE_PROPERTY), "")
            if node.op_type in QUANTIZERS and source in known:
                self._values[source] = list(node.output)
        for source, values in add_twins(model, self._values).items():
            self._values[source] = values
        returned = {value.name for value in model.graph.output}
        for name in dict.fromkeys(name for values in self._values.values() for name in values):
            if name not in returned:
                model.graph.output.append(onnx.ValueInfoProto(name=name))
        self._path = path
        self._session = OnnxSession(model.SerializeToString(), settings, folder=path.parent)

    def codes(self, arrays: Sequence[Array], found: Sequence[Array]) -> Codes:
        """Return the runtime's integers by program node, of dynamic ones with their scales and zero points.

        Raises:
            LoweringError: asking for them changed the outputs, so they prove nothing.
        """
        names = self._session.outputs
        results = dict(zip(names, self._session(*arrays), strict=True))
        for name, array in zip(names, found, strict=False):
            if results[name].tobytes() != array.tobytes():
                raise LoweringError(
                    f"ONNX Runtime computes output `{name}` of {self._path.name} differently when it also returns "
                    "the integers on the way, so they cannot be verified. Please report the model."
                )
        return {
            source: tuple(torch.from_numpy(np.asarray(results[value])) for value in values)
            for source, values in self._values.items()
        }


def _check_signature(session: OnnxSession, program: Program, path: Path) -> None:
    for kind, found, wanted in (
        ("inputs", session.inputs, program.inputs),
        ("outputs", session.outputs, program.outputs),
    ):
        names = tuple(spec.name for spec in wanted)
        if found != names:
            raise LoweringError(f"{path.name} has the {kind} {', '.join(found)}; the program has {', '.join(names)}.")


def _check_steps(program: Program, steps: Sequence[Deviation], where: str) -> None:
    for step in steps:
        if step.largest > _ALLOWED_STEPS:
            raise LoweringError(
                f"ONNX Runtime computes other integers than the program for {value_quantized(program, step.node)}: off "
                f"by {step.largest} steps, {step.share:.2%} of them differ, {where}, where rounding explains "
                f"{_ALLOWED_STEPS}. Leave what is around float ({_remedy(program, step.node)}), and report the model."
            )


def _check_drifts(program: Program, drifts: Sequence[Drift], where: str) -> None:
    for drift in drifts:
        if drift.error > drift.allowed:
            layer = value_computed(program, drift.node)
            raise LoweringError(
                f"ONNX Runtime computes {layer} otherwise than the program: off by {drift.error:.3g} of its largest "
                f"value, {where}, where rounding explains {drift.allowed:.3g}. Leave it float "
                f"({_remedy(program, drift.node)}), or report the model."
            )


def _remedy(program: Program, quantize: str) -> str:
    around = skip_around(program, quantize)
    return f"int8:skip={around}" if around else "leave out int8"


def _check_rounding(program: Program, feed: Tensors, plain: Tensors, got: Tensors, where: str) -> None:
    """Check that an artifact is as far from the program as the rounding of activations in its kernels explains."""
    rounded = RoundedActivations(program).outputs(feed)
    for spec, want, other, have in zip(program.outputs, plain, rounded, got, strict=True):
        if not want.is_floating_point():
            continue  # rounding may put either of two values first
        allowed = WORSE_THAN_TORCH * (relative_error(want, other) + half_of_the_digits(want.dtype))
        if (error := relative_error(want, have)) > allowed:
            raise LoweringError(
                "ONNX Runtime rounds activations to int8 in products with stored integers, which explains "
                f"{allowed:.3g} of the largest value of output `{spec.name}`; it is off by {error:.3g} ({where}). "
                "Please report the model; it may work without the pass `weights`."
            )


def _reference(program: Program, codes: Codes, feed: Tensors, wanted: Tensors) -> Reference:
    def rerun(seed: int, *, everywhere: bool = False) -> Tensors:
        noise = torch.Generator().manual_seed(seed)
        given = tuple(perturbed(tensor, noise) for tensor in feed)
        return Replay(program, noise=noise, everywhere=everywhere).outputs(given, codes)

    exact = functools.cache(lambda: Replay(program, exact=True).outputs(feed, codes))
    return Reference(wanted, exact, rerun, functools.partial(rerun, everywhere=True))
