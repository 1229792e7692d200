"""Blocks that learn by themselves: each is given what the teacher's block is given, and is to give what that gives.

    x -> block 1 -> block 2 -> head        x -> block 1    teacher's 1 -> block 2    teacher's 2 -> head

No gradient crosses a boundary, so all blocks learn in one run forward and backward, each from its own error, however
wrong the blocks before it still are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import fx

from graphopt.data.batches import Batch
from graphopt.distillation.augment import View
from graphopt.distillation.objective import Objective
from graphopt.distillation.taps import own_outputs
from graphopt.ir.graph import assemble, copy_graph_module
from graphopt.ir.program import Program


def boundaries(student: Program, teacher: Program, objective: Objective) -> list[int]:
    """List the pairs of `objective` at which a block can be given the teacher's values: they look like its own."""
    found, wanted = (program.outputs[len(own_outputs(program)) :] for program in (student, teacher))
    names = [spec.shape[:1] for spec in student.inputs if spec.shape]
    return [
        at
        for at, (own, taught) in enumerate(zip(found, wanted, strict=True))
        if (own.shape, own.dtype) == (taught.shape, taught.dtype) and own.shape[:1] in names
    ]


def separated(student: Program, taps: Sequence[int]) -> Program:
    """Return `student`, sharing its tensors, with the values of these taps as further inputs: what follows reads those.

    Args:
        student: tapped.
        taps: which of its taps are boundaries.
    """
    gm = copy_graph_module(student.graph_module)
    graph, output = gm.graph, gm.graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    first = len(results) - (len(student.outputs) - len(own_outputs(student)))
    last = graph.find_nodes(op="placeholder")[-1]
    for tap in taps:
        node = results[first + tap]
        with graph.inserting_after(last):
            last = graph.placeholder(f"given_{tap}")
        last.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(last, delete_user_cb=lambda user: user is not output)
    graph.set_codegen(fx.graph.CodeGen())  # takes and returns them flat
    result = assemble(gm, graph)
    specs = student.outputs[len(own_outputs(student)) :]
    given = [dataclasses.replace(specs[tap], name=f"given_{tap}") for tap in taps]
    examples = tuple(
        torch.zeros(0, dtype=spec.dtype, device=student.device) for spec in given
    )  # only their places are looked at
    return dataclasses.replace(
        student,
        graph_module=result,
        inputs=(*student.inputs, *given),
        example_args=(*student.flat_arguments(student.flat_examples()), *examples),
        example_kwargs={},
    )


@dataclasses.dataclass(frozen=True)
class BlockLesson:
    """Every block is to give what the teacher's gives; a batch holds what blocks are given, and what they are to give.

    Attributes:
        teacher: tapped as the objective says.
        objective: reads the flat outputs of both.
        taps: which pairs are boundaries.
    """

    teacher: Program
    objective: Objective
    taps: Sequence[int]

    def place(self, device: torch.device) -> None:
        """Do nothing: the teacher is where the student is."""

    def view_of(self, view: View) -> View:
        """Return a view of samples that puts what the teacher makes of them into the batch."""

        def taught(batch: Batch, generator: torch.Generator) -> Batch:
            batch = view(batch, generator)
            with torch.no_grad():
                outputs = self.teacher.call_flat(batch)
            first = len(outputs) - len(self.objective.pairs)
            return (*batch, *(outputs[first + tap] for tap in self.taps), *outputs)

        return taught

    def wanted(self, batch: Batch) -> Batch:
        """Return what the teacher gave."""
        return batch[-len(self.teacher.outputs) :]

    def loss(self, outputs: Sequence[torch.Tensor], wanted: Batch, batch: Batch) -> torch.Tensor:
        """Return the loss of outputs and taps; how it weights them does not matter to steps that have no scale."""
        return self.objective(outputs, wanted)

    def judged(self, outputs: Sequence[torch.Tensor], wanted: Batch, batch: Batch) -> torch.Tensor:
        """Return the loss."""
        return self.loss(outputs, wanted, batch)
