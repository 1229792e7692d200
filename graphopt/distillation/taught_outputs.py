"""Which outputs of a student are taught: by those of teachers, each by the loss that suits it, and by labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from graphopt.distillation.label_losses import LabelLoss
from graphopt.distillation.named_losses import is_softened, output_loss
from graphopt.distillation.objective import OutputKind, Target, targets_of
from graphopt.distillation.plan import DistillPlan, OutputPlan
from graphopt.distillation.taps import output_values, own_outputs
from graphopt.distillation.teachers import Teacher, alike, by_name, by_name_and_place
from graphopt.distillation.teaching import LabelTerm, Term
from graphopt.errors import DataError, UsageError
from graphopt.ir.program import Program
from graphopt.pipeline.plan import Refusal


def output_terms(
    plan: DistillPlan,
    student: Program,
    teachers: Sequence[Teacher],
    *,
    labelled: bool,
    labels: torch.Tensor | None = None,
) -> tuple[list[Term], list[Refusal]]:
    """Say which outputs teachers teach; `Term.taught` is the number of the teacher's output.

    Args:
        plan: what is asked for.
        student: whose outputs.
        teachers: where the student is.
        labelled: whether there are labels.
        labels: some of them, which tell where classes are; None: nothing is known of them.

    Raises:
        UsageError: the plan names an output that is not there, or one that differs from what it is to imitate.
    """
    alpha = plan.share_of_teachers(labelled=labelled)
    named = _named(plan, student)
    targets, refusals = _targets(student, named, plan, labels)
    if not alpha:
        return [], []
    terms, softened = [], False
    of_classes = _are_classes(plan, labels) if labelled else False
    for number, teacher in enumerate(teachers):
        weight = plan.teachers[number].weight if plan.teachers else 1.0
        for target in targets:
            wish = named.get(target.name, OutputPlan(student=target.name))
            found = _counterpart(target, student, teacher, wish)
            if isinstance(found, str):
                if target.name in named:
                    raise UsageError(f"The output `{target.name}` cannot be taught as the plan says: {found}.")
                refusals.append(Refusal(target.name, f"{found}: it is not taught", "outputs differ"))
                continue
            kinds = target.kind, _kind_of(teacher, found, target.kind, wish)
            for_labels = target.name == (plan.label_output or targets[0].name)
            if for_labels and of_classes:
                kinds = _logits(kinds[0]), _logits(kinds[1])
            anchored = not for_labels or of_classes is False
            softened |= is_softened(wish.loss, kinds)
            loss = output_loss(wish.loss, kinds, target.axis, plan.temperature, anchored=anchored)
            named_loss = ":" not in wish.loss
            terms.append(Term(target.name, target.index, number, found, loss, weight * wish.weight, named_loss))
    if not softened and plan.temperature != DistillPlan.model_fields["temperature"].default:
        reason = "no output is taught by soft labels: it softens nothing"
        refusals.append(Refusal("temperature", reason, "nothing is softened"))
    terms = [term for term in terms if term.weight]
    total = sum(term.weight for term in terms)
    return [replace(term, weight=alpha * term.weight / total) for term in terms], refusals


def label_term(
    plan: DistillPlan, student: Program, labels: torch.Tensor | None, *, labelled: bool, outputs_teach: bool
) -> LabelTerm | None:
    """Say what labels teach: all that outputs of teachers do not.

    Raises:
        DataError: the plan needs labels, and there are none.
        UsageError: the plan names an output that is not there.
    """
    if not labelled and plan.needs_labels:
        raise DataError(
            "The plan learns from labels (alpha below 1, label_loss or label_output), and the data has none. Give "
            "them: --labels FILE, or labels=..., or say alpha = 1."
        )
    weight = 1 - plan.share_of_teachers(labelled=True)
    if not labelled or not weight:
        return None
    target = label_target(plan, student, labels)
    loss = LabelLoss(plan.label_loss, target, _is_fixed(target, plan))
    return LabelTerm("labels", len(student.inputs), loss, weight if outputs_teach else 1.0)


def label_target(plan: DistillPlan, student: Program, labels: torch.Tensor | None) -> Target:
    """Return the output that labels are for.

    Raises:
        UsageError: there is none.
    """
    targets, _ = _targets(student, _named(plan, student), plan, labels)
    chosen = [target for target in targets if plan.label_output in ("", target.name)]
    if not chosen:
        known = ", ".join(f"`{target.name}`" for target in targets)
        raise UsageError(f"The student has no output `{plan.label_output}` for the labels. It has {known or 'none'}.")
    return chosen[0]


def _named(plan: DistillPlan, student: Program) -> dict[str, OutputPlan]:
    names = [spec.name for spec in student.outputs]
    for output in plan.outputs:
        if output.student not in names:
            raise UsageError(f"The student has no output `{output.student}`. It has {', '.join(names)}.")
    return {output.student: output for output in plan.outputs}


def _targets(
    student: Program, named: Mapping[str, OutputPlan], plan: DistillPlan, labels: torch.Tensor | None
) -> tuple[list[Target], list[Refusal]]:
    """Return the outputs that can be taught, their classes along the axes that the plan says, or else the labels."""
    found, refusals = targets_of(student)
    targets = []
    for target in found:
        wish = named.get(target.name, OutputPlan(student=target.name))
        output = student.outputs[target.index]
        if wish.axis is not None and wish.axis >= len(output.shape):
            raise UsageError(
                f"The plan says that axis {wish.axis} of the output `{target.name}` holds its classes, and it is "
                f"{output}: its last is {len(output.shape) - 1}."
            )
        kind, axis = _said(target.kind, wish), target.axis if wish.axis is None else wish.axis
        targets.append(replace(target, kind=kind, axis=axis))
    for at, target in enumerate(targets):
        if labels is not None and plan.label_output in ("", target.name):
            sizes = output_values(student)[target.index].meta["val"].shape
            targets[at] = _as_labelled(target, (len(labels), *sizes[1:]), plan, labels)
            break
    return targets, refusals


def _as_labelled(
    target: Target, sizes: Sequence[int | torch.SymInt], plan: DistillPlan, labels: torch.Tensor
) -> Target:
    """Return an output with its classes along the axis that class numbers leave out."""
    axis = LabelLoss("auto", target, _is_fixed(target, plan)).axis_in(sizes, labels)
    return replace(target, axis=axis) if axis is not None and _are_classes(plan, labels) else target


def _are_classes(plan: DistillPlan, labels: torch.Tensor | None) -> bool | None:
    """Whether labels say that an output is of classes; None where nothing is known of them."""
    if plan.label_loss != "auto":
        return {"cross_entropy": True, "mse": False}.get(
            plan.label_loss
        )  # of a function of the user's nothing is known
    return None if labels is None else not (labels.is_floating_point() or labels.is_complex())


def _is_fixed(target: Target, plan: DistillPlan) -> bool:
    """Whether the axis of its classes is the user's word."""
    return any(output.student == target.name and output.axis is not None for output in plan.outputs)


def _said(kind: OutputKind, wish: OutputPlan) -> OutputKind:
    return kind if wish.axis is None else _logits(kind)


def _logits(kind: OutputKind) -> OutputKind:
    """Return the kind of an output that is known to be of classes."""
    return "logits" if kind == "values" else kind


def _counterpart(target: Target, student: Program, teacher: Teacher, wish: OutputPlan) -> int | str:
    """Return the number of the teacher's output that teaches one of the student, or why there is none."""
    names = [spec.name for spec in teacher.outputs]
    named = by_name(own_outputs(student), teacher.outputs) or by_name(teacher.outputs, own_outputs(student))
    taught = wish.teacher or (target.name if named else "")
    if taught and taught not in names:
        return f"the teacher `{teacher.name}` has no output `{taught}`, it has {', '.join(names)}"
    places = by_name_and_place(own_outputs(student), teacher.outputs)
    index = names.index(taught) if taught else target.index if places is None else places[target.index]
    if index >= len(names):
        return f"the teacher `{teacher.name}` has {len(names)} outputs"
    own, other = student.outputs[target.index], teacher.outputs[index]
    same = alike(replace(own, dtype=other.dtype), other) and other.dtype.is_floating_point
    return index if same else f"it is {own}, and that of the teacher `{teacher.name}` {other}"


def _kind_of(teacher: Teacher, index: int, otherwise: OutputKind, wish: OutputPlan) -> OutputKind:
    """Return the kind of a teacher's output; of an artifact the operator that it comes from says it."""
    if teacher.program is None:
        return "probabilities" if teacher.comes_from(index) == "Softmax" else otherwise
    found = next((found.kind for found in targets_of(teacher.program)[0] if found.index == index), otherwise)
    return _said(found, wish)
