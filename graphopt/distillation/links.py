"""Links: which value of a student is taught by which value of a teacher, found by address, descent or structure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from graphopt.distillation.addresses import Tap, resolve
from graphopt.distillation.cuts import auto_taps
from graphopt.distillation.pairing import Pair, derived_from, pair_stages, pair_taps, spread
from graphopt.distillation.plan import Adapter, DistillPlan, PairPlan
from graphopt.distillation.teachers import Teacher
from graphopt.errors import UsageError
from graphopt.ir.program import Program
from graphopt.pipeline.plan import Refusal

By = int | Literal["student"]  # number of a teacher, or the student itself

_MOST = 12  # values that are found by descent


@dataclass(frozen=True)
class Link:
    """One value of the student, and the value that teaches it.

    Attributes:
        student: the student's.
        teacher: the teacher's.
        by: whose it is.
        loss: its name in the plan.
        weight: of the loss.
        adapter: whether there may be layers between them.
        channels: which of the teacher's channels the student's are; none: all.
        named: whether the user said so: then what cannot be is an error.
    """

    student: Tap
    teacher: Tap
    by: By
    loss: str
    weight: float
    adapter: Adapter = "auto"
    channels: tuple[int, ...] = ()
    named: bool = True

    def __str__(self) -> str:
        return f"`{self.student.address}` by `{self.teacher.address}`"


def links_of(
    plan: DistillPlan, student: Program, teachers: Sequence[Teacher], *, outputs_teach: bool
) -> tuple[list[Link], list[Refusal]]:
    """Find the values that a plan speaks of.

    Args:
        plan: names pairs, or asks for those that are found.
        student: the student.
        teachers: those that `by` counts.
        outputs_teach: whether an output of a teacher teaches one of the student; values inside do otherwise.

    Raises:
        UsageError: an address matches nothing, or a value cannot be read.
    """
    found = [link for pair in plan.pairs for link in _named(pair, student, teachers)]
    if plan.features == "stages" or (plan.features == "auto" and not outputs_teach and not plan.pairs):
        pairs, refusals = _structural(student, teachers)
        weight = plan.feature_weight / max(len(pairs), 1)
        found += [Link(pair.student, pair.teacher, by, plan.feature_loss, weight, named=False) for by, pair in pairs]
        return found, refusals
    return found, []


def _named(pair: PairPlan, student: Program, teachers: Sequence[Teacher]) -> list[Link]:
    """Find one pair of the plan; globs that match several values of both are spread over each other."""
    if pair.by == "student":
        owner = student
    elif pair.by >= len(teachers):
        raise UsageError(f"The plan has a pair by teacher {pair.by}, and there are {len(teachers)}, counted from 0.")
    else:
        program = teachers[pair.by].program
        if program is None:
            raise UsageError(
                f"The teacher `{teachers[pair.by].name}` is run by its runtime, which gives its outputs alone: the "
                f"value `{pair.teacher}` cannot be read. Give the model it was made of, or leave the pair out."
            )
        owner = program
    wide, narrow = _readable(owner, pair.teacher), _readable(student, pair.student)
    found = list(zip(*spread(wide, narrow), strict=True))
    same = [own for taught, own in found if pair.by == "student" and taught.node == own.node]
    if same:
        raise UsageError(f"The plan has `{same[0].address}` of the student taught by itself. Name a deeper value.")
    return [
        Link(own, taught, pair.by, pair.loss, pair.weight / len(found), pair.adapter, pair.channels)
        for taught, own in found
    ]


def _readable(program: Program, address: str) -> list[Tap]:
    taps, refusals = resolve(program, [address])
    if refusals:
        raise UsageError(f"The value at `{refusals[0].site}` cannot be read: {refusals[0].reason}.")
    return taps


def _structural(student: Program, teachers: Sequence[Teacher]) -> tuple[list[tuple[int, Pair]], list[Refusal]]:
    pairs: list[tuple[int, Pair]] = []
    refusals: list[Refusal] = []
    for number, teacher in enumerate(teachers):
        if teacher.program is None:
            refusals.append(Refusal(teacher.name, "its runtime gives its outputs alone: no value inside is read"))
            continue
        if derived_from(student, teacher.program):
            own, left = pair_taps(teacher.program, student, auto_taps(teacher.program, _MOST))
            refusals += left
        else:
            own = pair_stages(teacher.program, student)
        if not own:
            refusals.append(Refusal(teacher.name, "no value inside pairs with one of the student: name them"))
        pairs += [(number, pair) for pair in own]
    return pairs, refusals
