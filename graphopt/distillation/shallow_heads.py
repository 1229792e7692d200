"""Heads on shallower values of a student, which its output teaches: Zhang et al. 2019, "Be Your Own Teacher".

    layer1 (N, 32, 16, 16)  ->  mean over places (N, 32)  ->  Linear (N, classes)

Each learns from labels and from the student's own output, and so does what it stands on. Like adapters, heads are nodes
and parameters of the training graph alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from graphopt.distillation.adapters import Classifier, Shape
from graphopt.distillation.addresses import Tap, resolve
from graphopt.distillation.named_losses import output_loss
from graphopt.distillation.objective import Target
from graphopt.distillation.plan import DistillPlan
from graphopt.distillation.teaching import LabelTerm, Term
from graphopt.errors import UsageError
from graphopt.ir.program import Program


@dataclass(frozen=True)
class ShallowHead:
    """A head on a value of the student.

    Attributes:
        tap: the value.
        classifier: what stands on it.
        weight: of what it learns.
    """

    tap: Tap
    classifier: Classifier
    weight: float


def shallow_heads(plan: DistillPlan, student: Program, target: Target) -> list[ShallowHead]:
    """Find the heads of a plan.

    Args:
        plan: names the values.
        student: the student.
        target: the output that the heads are like.

    Raises:
        UsageError: an address matches nothing, a value cannot be read, or no head like the output can stand on it.
    """
    classes = student.outputs[target.index].shape[1:]
    if len(classes) != 1 or not isinstance(classes[0], int):
        raise UsageError(f"The plan has heads, which give (samples, classes), and the output `{target.name}` does not.")
    nodes = {node.name: node for node in student.graph.nodes}
    found = []
    for wish in plan.heads:
        taps, refusals = resolve(student, [wish.student])
        if refusals:
            raise UsageError(f"No head can stand at `{refusals[0].site}`: {refusals[0].reason}.")
        for tap in taps:
            shape = Shape.of(nodes[tap.node])
            if shape.channels is None or len(shape.sizes) < 2 or not nodes[tap.node].meta["val"].is_floating_point():
                raise UsageError(f"No head can stand at `{tap.address}`: its value is {shape}. Name one with channels.")
            found.append(ShallowHead(tap, Classifier(shape.axis, (shape.channels, classes[0])), wish.weight))
    return found


def head_terms(
    plan: DistillPlan, heads: Sequence[ShallowHead], target: Target, first: int, labels: LabelTerm | None
) -> tuple[list[Term], list[LabelTerm]]:
    """Return what the student's output and the labels teach heads.

    Args:
        plan: says how much of each.
        heads: whose values are outputs of the training graph, one after the other.
        target: the output.
        first: the number of the first of them.
        labels: what labels teach the output; None without them.
    """
    share = plan.share_of_teachers(labelled=labels is not None)
    terms, of_labels = [], []
    for index, head in enumerate(heads, start=first):
        name = f"head {head.tap.address}"
        loss = output_loss("auto", ("logits", target.kind), 1, plan.temperature, anchored=labels is None)
        terms.append(Term(name, index, "student", target.index, loss, share * head.weight, alike=True))
        if labels is not None:
            own = replace(labels.loss, target=Target(index, name, "logits", 1))
            of_labels.append(replace(labels, name=f"labels of {name}", loss=own, weight=(1 - share) * head.weight))
    return terms, of_labels
