"""Teachers: programs, modules, files and artifacts of a runtime, as something that flat inputs are given to."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from graphopt.capturing.load import load_with_data, with_data
from graphopt.data.batches import Batch
from graphopt.distillation.addresses import Tap
from graphopt.distillation.pairing import pair_taps
from graphopt.distillation.readings import Reading, gathered, opened, truncated
from graphopt.distillation.taps import strip_taps
from graphopt.errors import LoadError, UsageError
from graphopt.ir.placing import place
from graphopt.ir.program import Program
from graphopt.ir.signature import TensorSpec
from graphopt.loading.functions import is_function_name
from graphopt.pipeline.context import Context
from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.registry import DEFAULT_TARGET, backend_of
from graphopt.pipeline.runner import run
from graphopt.targets.backend import Artifact
from graphopt.targets.flat_session import flat

GivenTeacher: TypeAlias = nn.Module | Program | Artifact | str | Path


@dataclass(frozen=True)
class Reader:
    """What a teacher is asked for: some of its outputs and values inside, without gradients.

    Attributes:
        call: computes them from the teacher's flat inputs.
        program: what computes them, None for a runtime.
    """

    call: Callable[[Batch], Batch]
    program: Program | None = None

    @classmethod
    def of(cls, program: Program) -> Reader:
        """Return what reads all that a program gives."""
        return cls(_only_forward(program), program)

    def copied(self) -> Reader:
        """Return a reader with tensors of its own; a runtime is shared."""
        return self if self.program is None else Reader.of(self.program.copy(share_tensors=False))

    def place(self, device: torch.device) -> None:
        """Move a program; a runtime stays where it is, and gets and gives what is on the device."""
        if self.program is not None:
            place(self.program.graph_module, device)


@dataclass(frozen=True)
class Teacher:
    """A trained model that a student learns from.

    Attributes:
        name: what messages and reports call it.
        inputs: its flat inputs.
        outputs: its flat outputs.
        program: its graph, None for an artifact, which has no values inside to read.
        artifact: None for a program.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    program: Program | None = None
    artifact: Artifact | None = None

    @classmethod
    def open(
        cls, given: GivenTeacher, *, data: Any, names: Sequence[str] = (), trust: bool = False, seed: int = 0
    ) -> Teacher:
        """Open a teacher.

        Args:
            given: a module, which is captured on `data`; a program; an artifact of a runtime; the path of any of them;
                or `module:function`, which returns a module, and behind an `@` the file with its weights.
            data: inputs that it takes.
            names: of them, where they are in a tuple: a module whose arguments have these names takes them by name.
            trust: let its file run code.
            seed: of example inputs that are made up.

        Raises:
            GraphOptError: it cannot be loaded, or captured on the data.
        """
        if isinstance(given, Artifact):
            return cls(given.path.name, given.inputs, given.outputs, artifact=given)
        if isinstance(given, Program):
            return cls._of("program", given)
        if isinstance(given, nn.Module):
            if len(names) > 1:
                data = _by_arguments(given, names, data)
            return cls._of(type(given).__name__, with_data(given, data, share_tensors=True)[0])
        if not isinstance(given, str | Path):
            raise UsageError(
                f"A teacher cannot be of type {type(given).__name__}. Give a module, a program, an artifact, the path "
                "of one of them, or `module:function`."
            )
        text = str(given)
        factory, _, weights = text.partition("@")
        if is_function_name(factory):
            return cls._loaded(
                factory,
                lambda inputs: load_with_data(
                    factory=factory, weights=weights or None, data=inputs, trust=trust, seed=seed
                )[0],
                data,
                names,
            )
        path = Path(given)
        owner = backend_of(path, preferred=DEFAULT_TARGET)
        if owner is not None:
            if not path.is_file():
                raise LoadError(f"There is no {path}. Give the teacher's file.")
            return cls.open(owner.open(path), data=None)
        return cls._loaded(
            path.name, lambda inputs: load_with_data(path, data=inputs, trust=trust, seed=seed)[0], data, names
        )

    def comes_from(self, index: int) -> str:
        """Return the operator that an output of an artifact comes from, "" where nothing says it."""
        return "" if self.artifact is None else _operator_of(self.artifact.path, self.outputs[index].name)

    @classmethod
    def _loaded(cls, name: str, load: Callable[[Any], Program], data: Any, names: Sequence[str]) -> Teacher:
        """Return what a file or function holds, captured on inputs of the names that it gives them."""
        found = cls._of(name, load(data))
        own = [spec.name for spec in found.inputs]
        same = len(names) > 1 and sorted(own) == sorted(names) and own != list(names)
        return cls._of(name, load(dict(zip(names, data, strict=True)))) if same else found

    @classmethod
    def _of(cls, name: str, program: Program) -> Teacher:
        program = strip_taps(program.evaluated())
        return cls(name, program.inputs, program.outputs, program)

    def to(self, device: torch.device) -> Teacher:
        """Return the teacher on a device."""
        if self.program is None:
            return self
        return Teacher(self.name, self.inputs, self.outputs, self.program.to(device))

    def whole(self) -> Callable[[Batch], Batch]:
        """Return what computes all of its outputs."""
        return flat(self.artifact.session()) if self.artifact is not None else _only_forward(self._own())

    def reader(
        self, outputs: Sequence[int], readings: Sequence[Reading], channels: Sequence[tuple[int, Sequence[int]]]
    ) -> Reader:
        """Return what computes some outputs and values: a graph that ends at the deepest of them, BatchNorm folded.

        Args:
            outputs: which of its outputs.
            readings: which values inside.
            channels: for each value its axis of channels, and which of them are wanted; none: all.
        """
        if self.program is None:
            answer = self.whole()

            def chosen(batch: Batch) -> Batch:
                found = answer(batch)
                return tuple(found[index] for index in outputs)

            return Reader(chosen)
        return Reader.of(truncated(gathered(self._opened(readings), channels), outputs).copy(share_tensors=False))

    def _opened(self, readings: Sequence[Reading]) -> Program:
        """Return the program with its BatchNorms folded, where all that is read is still there then."""
        own = self._own()
        folded = _folded(own)
        pairs, lost = pair_taps(own, folded, [reading.tap for reading in readings])
        if lost:
            return opened(own, readings)
        nodes = [Tap(pair.teacher.address, pair.student.node) for pair in pairs]
        return opened(folded, [Reading(tap, old.loss) for tap, old in zip(nodes, readings, strict=True)])

    def _own(self) -> Program:
        assert self.program is not None
        return self.program


def _operator_of(path: Path, output: str) -> str:
    """Return the operator of a file that an output comes from, "" where it says none."""
    if path.suffix != ".onnx":
        return ""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    return next((node.op_type for node in graph.node if output in node.output), "")


def check_inputs(teacher: Teacher, found: Sequence[TensorSpec], whose: str) -> tuple[int, ...]:
    """Return which of the inputs that are there a teacher takes: those of its names, otherwise by place.

    Raises:
        UsageError: it takes something else.
    """
    single = [spec for spec in teacher.inputs if spec.shape and isinstance(spec.shape[0], int)]
    if single:
        raise UsageError(
            f"The teacher `{teacher.name}` takes batches of {single[0].shape[0]} alone. Export it with a dynamic batch."
        )
    for places in (by_name(teacher.inputs, found), by_name_and_place(teacher.inputs, found)):
        if places is not None and all(alike(own, found[at]) for own, at in zip(teacher.inputs, places, strict=True)):
            return tuple(places)
    raise UsageError(
        f"The teacher `{teacher.name}` takes {', '.join(map(str, teacher.inputs))}, and {whose} "
        f"{', '.join(map(str, found))}. Give it inputs of its own, sample by sample the same: --teacher-data FILE, "
        "or teacher_data=..."
    )


def by_name(wanted: Sequence[TensorSpec], there: Sequence[TensorSpec]) -> list[int] | None:
    """Return where among some inputs or outputs all of others are by their names; None: not all are there."""
    places = {spec.name: at for at, spec in enumerate(there)}
    return [places[spec.name] for spec in wanted] if all(spec.name in places for spec in wanted) else None


def by_name_and_place(wanted: Sequence[TensorSpec], there: Sequence[TensorSpec]) -> list[int] | None:
    """Return where each is among as many others: equal names together, the rest in order; None: not as many."""
    if len(wanted) != len(there):
        return None
    names = {spec.name for spec in wanted}
    rest = iter([at for at, spec in enumerate(there) if spec.name not in names])
    places = {spec.name: at for at, spec in enumerate(there)}
    return [places[spec.name] if spec.name in places else next(rest) for spec in wanted]


def alike(one: TensorSpec, other: TensorSpec) -> bool:
    """Whether two tensors have the same type and, but for the number of samples and where both are known, sizes."""
    sizes = zip(one.shape[1:], other.shape[1:], strict=False)
    same = all(isinstance(a, str) or isinstance(b, str) or a == b for a, b in sizes)
    return one.dtype == other.dtype and len(one.shape) == len(other.shape) and same


def _by_arguments(module: nn.Module, names: Sequence[str], data: Any) -> Any:
    """Return inputs by the arguments of a module that have their names, the rest by those left, where any has."""
    arguments = list(inspect.signature(module.forward).parameters)
    if not set(names) & set(arguments):
        return data
    rest = iter([argument for argument in arguments if argument not in names])
    called = [name if name in arguments else next(rest, name) for name in names]
    return dict(zip(called, data, strict=True))


def _folded(program: Program) -> Program:
    return run(Pipeline.parse("fold"), program, Context(original=program)).programs[""]


def _only_forward(program: Program) -> Callable[[Batch], Batch]:
    def call(batch: Batch) -> Batch:
        with torch.no_grad():
            return program.call_flat(batch)

    return call
