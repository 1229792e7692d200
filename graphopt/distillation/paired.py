"""A student with its teachers as one module, for a training loop of the user's own, and the way back.

    paired = graphopt.pair_for_training(student, teacher, plan)
    optimizer = torch.optim.SGD(paired.train().parameters(), lr=0.1)
    for images, labels in loader:
        optimizer.zero_grad()
        paired(images, labels=labels).loss.backward()
        optimizer.step()
    program = graphopt.finish(paired)

It is moved and copied as one, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from graphopt.capturing.load import with_data
from graphopt.data.batches import Batch
from graphopt.distillation.heads import with_head
from graphopt.distillation.plan import DistillPlan
from graphopt.distillation.preparing import PreparedLesson, prepare
from graphopt.distillation.taps import strip_taps, taps_of
from graphopt.distillation.teachers import GivenTeacher, Teacher
from graphopt.distillation.weights import keep_zeros
from graphopt.errors import DataError, UsageError
from graphopt.ir.global_state import one_thread_at_a_time, random_state_kept
from graphopt.ir.placing import place
from graphopt.ir.program import Program
from graphopt.ir.torch_internals import pytree


class Taught(NamedTuple):
    """What a student gave, and what its teachers say of it.

    Attributes:
        outputs: as the student's model returns them.
        loss: what to train on.
        losses: its parts by name, weighted.
    """

    outputs: Any
    loss: torch.Tensor
    losses: dict[str, torch.Tensor]


class PairedModule(nn.Module):
    """A student and its teachers: gives outputs and losses, and has the student's and the adapters' parameters alone.

    Attributes:
        program: the student's training graph.
    """

    def __init__(self, prepared: PreparedLesson) -> None:
        super().__init__()
        self.program = prepared.student
        self.student = prepared.student.graph_module
        keep_zeros(self.program)
        self._prepared = prepared  # no module: its teachers are neither trained nor stored
        self.eval()  # as the student is

    def forward(
        self, *inputs: torch.Tensor, labels: torch.Tensor | None = None, teacher_inputs: Sequence[torch.Tensor] = ()
    ) -> Taught:
        """Run student and teachers.

        Args:
            inputs: what the student takes, in the order of `program.inputs`.
            labels: of the same samples, where the plan learns from labels.
            teacher_inputs: what teachers take that have inputs of their own.

        Raises:
            DataError: there are no labels, and the plan learns from them, or they do not fit.
            UsageError: something else is given than student and teachers take.
        """
        lesson = self._prepared.lesson
        self._check(inputs, labels, teacher_inputs)
        batch = (*inputs, *([] if labels is None else [labels]), *teacher_inputs)
        args, kwargs = self.program.unflatten(inputs)
        found = self.program(*args, **kwargs)
        with torch.no_grad():
            wanted = lesson.wanted(batch)
        leaves = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        losses = lesson.terms(leaves, wanted, batch)
        own = found[0] if taps_of(self.program) else found
        return Taught(own, torch.stack([*losses.values()]).sum(), losses)

    def train(self, mode: bool = True) -> Self:
        """Put the student in training or evaluation mode; teachers stay as they are."""
        super().train(mode)
        self.program.train(mode)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> PairedModule:
        """Copy the student with its adapters, and the teachers."""
        student, lesson = self.program.copy(share_tensors=False), self._prepared.lesson.copied()
        found = PairedModule(dataclasses.replace(self._prepared, student=student, lesson=lesson))
        memo[id(self)] = found
        return found.train(self.training)

    def __copy__(self) -> PairedModule:
        """Return a module that shares student and teachers."""
        found = PairedModule.__new__(PairedModule)
        found.__dict__.update(self.__dict__)
        return found

    def __reduce__(self) -> Any:
        """Refuse to be pickled: what teaches may be a session or a function of the user's.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "A pair is not pickled: its teachers may be sessions and its losses functions. Store "
            "`paired.state_dict()`, and load it into what pair_for_training makes of the same models."
        )

    def _check(
        self, inputs: Sequence[torch.Tensor], labels: torch.Tensor | None, teacher_inputs: Sequence[torch.Tensor]
    ) -> None:
        """Compare what is given with what student and teachers take."""
        lesson, specs = self._prepared.lesson, self.program.inputs
        takes = ", ".join(map(str, specs))
        if len(inputs) != len(specs):
            raise UsageError(f"The student takes {takes}: {len(specs)} tensors, and {len(inputs)} were given.")
        for spec, given in zip(specs, inputs, strict=True):
            if not isinstance(given, torch.Tensor) or given.dim() != len(spec.shape) or not _fits(given, spec.dtype):
                was = f"{list(given.shape)} {given.dtype}" if isinstance(given, torch.Tensor) else type(given).__name__
                raise UsageError(f"The student takes {takes}, and {was} was given.")
        if lesson.labels is not None and labels is None:
            raise DataError("The plan learns from labels, and the batch came without: paired(inputs, labels=...).")
        if lesson.labels is None and labels is not None:
            raise UsageError("Labels are given that nothing learns from. Say labelled=True where the two are paired.")
        if len(teacher_inputs) != (own := lesson.columns - lesson.own):
            raise UsageError(
                f"Teachers take {own} tensors of their own, and {len(teacher_inputs)} were given: teacher_inputs=(...)."
            )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Move the student, and the teachers behind it.

        Raises:
            UsageError: `fn` makes them of another type.
        """
        for kind, device in {(tensor.dtype, tensor.device) for tensor in self.parameters()}:
            if fn(torch.empty(0, dtype=kind, device=device)).dtype != kind:
                raise UsageError(
                    f"A captured student computes in its own types, here {kind}, as its teachers do. Convert the "
                    "models before they are paired, or call the pair under torch.autocast."
                )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = next((tensor.device for tensor in self.parameters()), torch.device("cpu"))
        place(self.student, device)
        examples = self.program.example_args, dict(self.program.example_kwargs)
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), examples)
        self.program = dataclasses.replace(self.program, example_args=args, example_kwargs=kwargs)
        self._prepared.lesson.place(device)
        return self


def _fits(given: torch.Tensor, kind: torch.dtype) -> bool:
    if given.dtype == kind or not (given.is_floating_point() or kind.is_floating_point):
        return True
    return torch.is_autocast_enabled(given.device.type) and given.is_floating_point() and kind.is_floating_point


@one_thread_at_a_time()
@random_state_kept()
def pair_for_training(
    student: nn.Module | Program,
    teacher: GivenTeacher | Sequence[GivenTeacher] | None,
    plan: DistillPlan | Mapping[str, Any] | str | Path | None = None,
    *,
    data: Any = None,
    teacher_data: Any = None,
    labelled: bool | None = None,
    seed: int = 0,
) -> PairedModule:
    """Put a student and its teachers into one module that returns outputs and losses.

    Args:
        student: a module, which is captured on `data`, or a program. It is not changed: its copy is trained.
        teacher: what `distill` takes; several in a sequence; None where labels or the student itself teach.
        plan: what is taught, and how; its training options (epochs, rates, views) are the user's loop's.
        data: a few samples, where a module is to be captured.
        teacher_data: likewise, for teachers that take inputs of their own.
        labelled: whether batches come with labels; None: where the plan says something of them.
        seed: of the weights of adapters.

    Raises:
        GraphOptError: as `distill` does.
    """
    plan = DistillPlan.of(plan)
    program = with_new_head(with_data(student, data)[0].evaluated(), plan, seed)
    opened = open_teachers(teacher, program, program.flat_examples(), plan, teacher_data)
    generator = torch.Generator().manual_seed(seed)
    found = prepare(
        plan,
        program,
        opened,
        generator,
        labelled=plan.needs_labels if labelled is None else labelled and plan.alpha != 1,
        apart=plan.apart(len(opened), given=teacher_data is not None),
    )
    return PairedModule(found)


def with_new_head(student: Program, plan: DistillPlan, seed: int) -> Program:
    """Return the student without taps of its own, and with the head that a plan asks for."""
    student = strip_taps(student)
    if plan.head is None:
        return student
    return with_head(student, plan.head, plan.label_output, torch.Generator().manual_seed(seed))


def open_teachers(
    given: GivenTeacher | Sequence[GivenTeacher] | None,
    student: Program,
    inputs: Batch,
    plan: DistillPlan,
    own: Any = None,
    *,
    trust: bool = False,
    seed: int = 0,
) -> list[Teacher]:
    """Open one teacher or several, where the student is, on some of its inputs or, as the plan says, on their own."""
    listed: list[Any] = [] if given is None else [given]
    if isinstance(given, list | tuple):
        listed = list(given)
    names = [spec.name for spec in student.inputs]
    return [
        Teacher.open(one, data=own if apart else inputs, names=[] if apart else names, trust=trust, seed=seed).to(
            student.device
        )
        for one, apart in zip(listed, plan.apart(len(listed), given=own is not None), strict=True)
    ]


def finish(program: Program | PairedModule) -> Program:
    """Return a trained student as it is deployed: without taps and adapters, in evaluation mode, with its own tensors.

    Raises:
        UsageError: it is neither a program nor what `pair_for_training` made.
    """
    found = program.program if isinstance(program, PairedModule) else program
    if not isinstance(found, Program):
        raise UsageError(f"{type(program).__name__} is no program. Give what pair_for_training returned.")
    return strip_taps(found).copy(share_tensors=False).eval()
