"""What a student is to imitate: the teacher's outputs, each by the loss that suits it, and its taps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from graphopt.distillation.channels import axis_of_channels, axis_of_classes
from graphopt.distillation.losses import relative_error, soft_labels, tap_loss
from graphopt.distillation.pairing import Pair
from graphopt.distillation.taps import output_values, own_outputs
from graphopt.ir.finite import only_stored
from graphopt.ir.operators import (
    ALL_CONVOLUTIONS,
    CARRYING,
    DIVISIONS,
    LOG_SOFTMAXES,
    MULTIPLICATIONS,
    PRODUCTS,
    SOFTMAXES,
    SUMS,
)
from graphopt.ir.program import Program
from graphopt.pipeline.plan import Refusal

OutputKind = Literal["logits", "probabilities", "values"]

_WEIGHTED = PRODUCTS | ALL_CONVOLUTIONS


@dataclass(frozen=True, slots=True)
class Target:
    """One output that the student imitates."""

    index: int  # among the tensor outputs
    name: str
    kind: OutputKind
    axis: int  # of its classes or channels


def targets_of(teacher: Program) -> tuple[list[Target], list[Refusal]]:
    """Say how each output of `teacher` is imitated; outputs that have no gradient are refused.

    "logits": what a weighted layer gives for each sample or each place of a sequence, or a log-softmax for anything.
    "probabilities": what a softmax gives. "values": everything else, embeddings and maps among it.
    """
    targets, refusals = [], []
    for index, (spec, node) in enumerate(zip(own_outputs(teacher), output_values(teacher), strict=True)):
        if has_gradients(spec.dtype):
            targets.append(Target(index, spec.name, *_kind(node)))
        else:
            reason = f"output is {str(spec.dtype).removeprefix('torch.')}: it has no gradient to learn from"
            refusals.append(Refusal(spec.name, reason, "output has no gradient"))
    return targets, refusals


@dataclass(frozen=True)
class Objective:
    """The loss of a student against its teacher, as a function of what both return.

    Attributes:
        targets: the outputs imitated.
        pairs: the taps imitated; both programs have them as outputs, in this order after their own.
        temperature: softens the labels of logits and probabilities.
        alpha: weight of the mean tap loss against the mean output loss.
    """

    targets: Sequence[Target]
    pairs: Sequence[Pair]
    temperature: float
    alpha: float

    def __call__(self, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the loss of flat outputs: own outputs first, then one per pair."""
        loss = self.of_outputs(student, teacher)
        if self.pairs and self.alpha:
            taps = zip(student[-len(self.pairs) :], teacher[-len(self.pairs) :], strict=True)
            loss = loss + self.alpha * torch.stack([tap_loss(found, wanted) for found, wanted in taps]).mean()
        return loss

    def of_outputs(self, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the mean loss of the outputs alone: what a held-out set is judged by."""
        losses = [self._of(target, student[target.index], teacher[target.index]) for target in self.targets]
        return torch.stack(losses).mean()

    def _of(self, target: Target, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        values = relative_error(student, teacher)
        if target.kind == "values":
            return values
        # Soft labels do not see a constant added to all logits, and what looks like logits may be an embedding or a
        # regression: the relative error anchors the values themselves.
        found, wanted = (logits_of(value, target.kind, target.axis) for value in (student, teacher))
        return soft_labels(found, wanted, self.temperature) + values


def comparable(teacher: Program, student: Program, pairs: Sequence[Pair]) -> tuple[list[Pair], list[Refusal]]:
    """Keep the pairs that a tap loss is defined for: floating values with the same first axis."""
    values = [{node.name: node.meta.get("val") for node in program.graph.nodes} for program in (teacher, student)]
    kept, refusals = [], []
    for pair in pairs:
        wanted, found = values[0][pair.teacher.node], values[1][pair.student.node]
        if not (has_gradients(wanted.dtype) and has_gradients(found.dtype)):
            reason = "its value is of a type that has no gradient to learn from"
        elif not (wanted.dim() and found.dim() and str(wanted.shape[0]) == str(found.shape[0])):
            reason = f"teacher and student share no first axis: {tuple(wanted.shape)} and {tuple(found.shape)}"
        else:
            kept.append(pair)
            continue
        refusals.append(Refusal(pair.teacher.address, reason, reason.partition(":")[0]))
    return kept, refusals


def has_gradients(dtype: torch.dtype) -> bool:
    """Whether torch computes gradients in a type: there are no sums in float8."""
    return dtype.is_floating_point and not only_stored(dtype)


def logits_of(values: torch.Tensor, kind: OutputKind, axis: int) -> torch.Tensor:
    """Return logits with their classes last: of probabilities the logarithms, finite where they are zero."""
    values = values.movedim(axis, -1)
    if kind != "probabilities":
        return values
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return wide.clamp_min(torch.finfo(torch.float32).tiny).log()


def _kind(node: fx.Node) -> tuple[OutputKind, int]:
    """Return what an output is, and the axis of its classes or channels."""
    value = node.meta["val"]
    told = axis_of_classes(node)
    axis = told or axis_of_channels(node)
    scaled = False
    while isinstance(source := node.args[0] if node in CARRYING else _scaled(node), fx.Node):
        scaled |= node not in CARRYING
        node = source
    if not value.dim() or (isinstance(value.shape[axis], int) and value.shape[axis] < 2):
        return "values", axis
    if node in SOFTMAXES or node in LOG_SOFTMAXES:
        return "values" if scaled or not told else "probabilities" if node in SOFTMAXES else "logits", axis
    return "logits" if node in _WEIGHTED and value.dim() in (2, 3) else "values", axis


def _scaled(node: fx.Node) -> fx.Node | None:
    """Return what a node scales or shifts by constants, such as logits by what was learned; None: it does not."""
    first, *others = node.args[:2] if node in SUMS | MULTIPLICATIONS | DIVISIONS else [None]
    if node in SUMS | MULTIPLICATIONS and _is_constant(first):
        first, others = others[0], [first]
    return first if isinstance(first, fx.Node) and not _is_constant(first) and all(map(_is_constant, others)) else None


def _is_constant(value: Any) -> bool:
    """Whether a value is the same in every run."""
    if not isinstance(value, fx.Node):
        return isinstance(value, int | float)
    inputs = value.all_input_nodes
    return value.op == "get_attr" or (value.op == "call_function" and bool(inputs) and all(map(_is_constant, inputs)))
