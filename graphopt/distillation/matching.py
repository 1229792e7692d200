"""Matching: by which loss, behind which adapter, two values of a link can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from graphopt.distillation.adapters import Change, MismatchError, Shape, change
from graphopt.distillation.links import Link
from graphopt.distillation.losses import tap_loss_for
from graphopt.distillation.named_losses import AGREEMENTS
from graphopt.distillation.objective import has_gradients
from graphopt.distillation.readings import Reading, opened, tapped_nodes
from graphopt.distillation.teachers import Teacher
from graphopt.errors import UsageError
from graphopt.ir.program import Program
from graphopt.pipeline.plan import Refusal


@dataclass(frozen=True)
class Match:
    """A link whose values can be compared.

    Attributes:
        link: the two values.
        loss: its name, settled.
        change: what the adapter does to the student's value.
        channels: the teacher's axis of channels.
    """

    link: Link
    loss: str
    change: Change
    channels: int

    def __str__(self) -> str:
        adapter = f", adapter {self.change}" if self.change else ""
        return f"{self.link}: {self.loss}, weight {self.link.weight:g}{adapter}"


def matches_of(
    links: Sequence[Link], student: Program, teachers: Sequence[Teacher]
) -> tuple[list[Match], list[Refusal]]:
    """Match the two values of every link.

    Returns:
        The matches, and a refusal for each link that was found, not named, and does not match.

    Raises:
        UsageError: a link that the plan names does not match.
    """
    matches, refusals = [], []
    found = _values(student, [Reading(link.student, link.loss) for link in links])
    wanted = _values_of_teachers(links, student, teachers)
    for link, own, other in zip(links, found, wanted, strict=True):
        try:
            matches.append(_match(link, own, other))
        except MismatchError as err:
            if link.named:
                raise UsageError(
                    f"The pair {link} of the plan cannot be: {err}. A loss that compares samples alone takes any two: "
                    "similarity, distances or angles."
                ) from err
            refusals.append(Refusal(link.student.address, str(err), "the shapes differ"))
    return matches, refusals


@dataclass(frozen=True)
class _Value:
    shape: Shape
    dtype: torch.dtype


def _values(program: Program, readings: Sequence[Reading]) -> list[_Value]:
    nodes = tapped_nodes(opened(program, readings)) if readings else []
    return [_Value(Shape.of(node), node.meta["val"].dtype) for node in nodes]


def _values_of_teachers(links: Sequence[Link], student: Program, teachers: Sequence[Teacher]) -> list[_Value]:
    """Return the teacher's value of every link."""
    found: dict[int, _Value] = {}
    for by in dict.fromkeys(link.by for link in links):
        numbers = [number for number, link in enumerate(links) if link.by == by]
        owner = student if by == "student" else teachers[by].program
        assert owner is not None
        readings = [Reading(links[number].teacher, links[number].loss) for number in numbers]
        found.update(zip(numbers, _values(owner, readings), strict=True))
    return [found[number] for number in range(len(links))]


def _match(link: Link, own: _Value, other: _Value) -> Match:
    if not (has_gradients(own.dtype) and has_gradients(other.dtype)):
        raise MismatchError("a value is of a type that has no gradient to learn from")
    wanted = _gathered(link, other.shape)
    loss, free = link.loss, link.adapter == "auto"
    if loss == "auto":
        loss = _loss_for(own.shape, wanted, free=free)
    agreement = AGREEMENTS.get(loss)
    if link.channels and agreement == "sizes" and own.shape.channels not in (None, len(link.channels)):
        raise MismatchError(
            f"{len(link.channels)} channels are asked of the teacher's {other.shape}, and the student's value is "
            f"{own.shape}, with {own.shape.channels}"
        )
    if agreement is None:  # the user's own, who may take shapes that nothing makes equal
        agreement = "sizes" if free and len(own.shape.sizes) == len(wanted.sizes) else "samples"
    between = change(own.shape, wanted, agreement)
    if between and not free:
        raise MismatchError(
            f"the student's value is {own.shape}, the teacher's {wanted}, and there is to be no adapter"
        )
    return Match(link, loss, between, wanted.axis)


def _loss_for(own: Shape, wanted: Shape, *, free: bool) -> str:
    if not free:
        return tap_loss_for(own.sizes, wanted.sizes)[0]
    try:
        change(own, wanted, "sizes")
    except MismatchError:
        return "similarity"
    return "values"


def _gathered(link: Link, shape: Shape) -> Shape:
    """Return the shape of the channels that are wanted of a teacher's value."""
    if not link.channels:
        return shape
    if shape.channels is not None and max(link.channels) >= shape.channels:
        raise MismatchError(f"channel {max(link.channels)} is asked of the teacher's {shape}")
    return replace(
        shape,
        sizes=tuple(len(link.channels) if axis == shape.axis else size for axis, size in enumerate(shape.sizes)),
    )
