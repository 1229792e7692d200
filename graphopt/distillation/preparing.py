"""From a plan to a lesson: what of it holds for a student and its teachers, and the student's training graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from graphopt.distillation.adapters import Change, Classifier
from graphopt.distillation.links import links_of
from graphopt.distillation.matching import Match, matches_of
from graphopt.distillation.named_losses import pair_loss
from graphopt.distillation.plan import DistillPlan
from graphopt.distillation.readings import Reading, adapted, opened
from graphopt.distillation.shallow_heads import ShallowHead, head_terms, shallow_heads
from graphopt.distillation.taps import own_outputs
from graphopt.distillation.taught_outputs import label_target, label_term, output_terms
from graphopt.distillation.teachers import Reader, Teacher, check_inputs
from graphopt.distillation.teaching import Teaching, Term
from graphopt.errors import UsageError
from graphopt.ir.plain_data import Json
from graphopt.ir.program import Program
from graphopt.pipeline.plan import Refusal

_ALIKE = ("values", "cosine", "attention_scores", "attention_probabilities")  # losses of values of one shape


@dataclass(frozen=True)
class PreparedLesson:
    """A student that can be taught, and what it is taught.

    Attributes:
        student: its training graph, with taps and adapters, owning its tensors.
        lesson: what it learns.
        said: how outputs and values are taught, for people.
        refusals: what was looked for and is not taught.
    """

    student: Program
    lesson: Teaching
    said: dict[str, Json] = field(default_factory=dict)
    refusals: tuple[Refusal, ...] = ()


def prepare(
    plan: DistillPlan,
    student: Program,
    teachers: Sequence[Teacher],
    generator: torch.Generator,
    *,
    labelled: bool,
    labels: torch.Tensor | None = None,
    apart: Sequence[bool],
) -> PreparedLesson:
    """Make a lesson of a plan.

    Args:
        plan: what is asked for.
        student: it is not changed.
        teachers: where the student is; none: labels and the student itself teach.
        generator: draws the weights of adapters.
        labelled: whether there are labels, behind the student's inputs in a batch.
        labels: some of them; None: nothing is known of them.
        apart: by teacher, whether it takes inputs of its own, which then lie behind the labels in a batch.

    Raises:
        UsageError: the plan names what is not there or cannot be, or nothing teaches.
        DataError: a loss needs labels, and there are none.
    """
    terms, refusals = output_terms(plan, student, teachers, labelled=labelled, labels=labels)
    taught = bool(terms) or not plan.share_of_teachers(labelled=labelled)  # else labels alone teach, as was asked
    links, unpaired = links_of(plan, student, teachers, outputs_teach=taught)
    matches, unmatched = matches_of(links, student, teachers)
    own = len(student.inputs) + labelled
    by_labels = label_term(plan, student, labels, labelled=labelled, outputs_teach=bool(terms))
    target = label_target(plan, student, labels) if plan.heads else None
    heads = [] if target is None else shallow_heads(plan, student, target)
    if not terms and not matches and by_labels is None:
        raise UsageError(_nothing(teachers, [*refusals, *unpaired, *unmatched]))
    asked = [sorted({term.taught for term in terms if term.by == number}) for number in range(len(teachers))]
    pairs = _pair_terms(matches, len(own_outputs(student)), asked)
    first = len(own_outputs(student)) + len(_readings(matches))
    of_heads = ([], []) if target is None else head_terms(plan, heads, target, first, by_labels)
    lesson = Teaching(
        own,
        [_reader(teacher, asked[number], matches, number) for number, teacher in enumerate(teachers)],
        _places(student, teachers, apart, own),
        [_numbered(term, asked) for term in terms],
        [*pairs, *of_heads[0]],
        by_labels,
        of_heads[1],
    )
    said: dict[str, Json] = {
        "outputs": {
            f"{term.name} by {_called(teachers, term.by)}": term.weight for term in terms if term.by != "student"
        },
        "pairs": [str(match) for match in matches],
        "heads": [head.tap.address for head in heads],
        "labels": by_labels.weight if by_labels else 0.0,
    }
    training = _training_graph(student, matches, heads, generator).copy(share_tensors=False)
    return PreparedLesson(training, lesson, said, (*refusals, *unpaired, *unmatched))


def _training_graph(
    student: Program, matches: Sequence[Match], heads: Sequence[ShallowHead], generator: torch.Generator
) -> Program:
    """Return the student with a tap for every reading of its values, behind the adapter, then for every head."""
    found = [*_readings(matches), *((Reading(head.tap, "values"), head.classifier) for head in heads)]
    if not found:
        return student
    readings, changes = zip(*found, strict=True)
    return adapted(opened(student, readings), changes, generator)


def _readings(matches: Sequence[Match]) -> list[tuple[Reading, Change | Classifier]]:
    """List what is read of the student, with what stands behind it: each value taught, then those that teach."""
    deeper = [match for match in matches if match.link.by == "student"]
    return [
        *((Reading(match.link.student, match.loss), match.change) for match in matches),
        *((Reading(match.link.teacher, match.loss), Change()) for match in deeper),
    ]


def _reader(teacher: Teacher, outputs: Sequence[int], matches: Sequence[Match], number: int) -> Reader:
    own = [match for match in matches if match.link.by == number]
    readings = [Reading(match.link.teacher, match.loss) for match in own]
    return teacher.reader(outputs, readings, [(match.channels, match.link.channels) for match in own])


def _places(student: Program, teachers: Sequence[Teacher], apart: Sequence[bool], own: int) -> list[Sequence[int]]:
    places: list[Sequence[int]] = []
    start = own
    for number, teacher in enumerate(teachers):
        if apart[number]:
            places.append(range(start, start + len(teacher.inputs)))
            start += len(teacher.inputs)
        else:
            places.append(check_inputs(teacher, student.inputs, "the student"))
    return places


def _numbered(term: Term, asked: Sequence[Sequence[int]]) -> Term:
    """Return a term that counts its teacher's output among those that are asked for."""
    assert term.by != "student"
    return replace(term, taught=asked[term.by].index(term.taught))


def _pair_terms(matches: Sequence[Match], own: int, asked: Sequence[Sequence[int]]) -> list[Term]:
    terms = []
    behind = {number: len(outputs) for number, outputs in enumerate(asked)}
    deeper = own + len(matches)
    for index, match in enumerate(matches, start=own):
        by = match.link.by
        if by == "student":
            taught, deeper = deeper, deeper + 1
        else:
            taught, behind[by] = behind[by], behind[by] + 1
        loss = pair_loss(match.loss, match.channels)
        alike = match.loss in _ALIKE
        terms.append(
            Term(f"pair {match.link.student.address} {match.loss}", index, by, taught, loss, match.link.weight, alike)
        )
    return terms


def _called(teachers: Sequence[Teacher], number: int) -> str:
    """Return the name of a teacher, with its number where several have it."""
    name = teachers[number].name
    return name if [teacher.name for teacher in teachers].count(name) == 1 else f"{name} ({number + 1})"


def _nothing(teachers: Sequence[Teacher], refusals: Sequence[Refusal]) -> str:
    if not teachers:
        return "Nothing teaches the student: give a teacher, or labels."
    reasons = "; ".join(f"`{refusal.site}`: {refusal.reason}" for refusal in refusals[:3]) or "all weights are 0"
    return f"Nothing of {teachers[0].name} teaches the student: {reasons}. Name pairs in the plan, or give labels."
