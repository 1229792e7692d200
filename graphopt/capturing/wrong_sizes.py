"""Sizes that were not traced and at which a program is not the model: other batches, and what the trace asked about."""

from __future__ import annotations

from graphopt.capturing.asked_sizes import AskedSizes, OtherSizes
from graphopt.capturing.compared import Compared
from graphopt.ir.batch_sizes import BatchSizes
from graphopt.ir.program import Program

_CHECKED_BATCHES = (1, 3)  # sizes beside the captured one at which program and model are compared


def wrong_batch(program: Program, compared: Compared) -> str:
    """Say at which batch size a program with a dynamic batch is not the model, "" if at none tried.

    A Python branch on the batch size leaves no trace in the graph, nor does an operator that takes one size alone where
    what torch knows of its shapes does not ask: only running it shows.
    """
    examples = program.flat_examples()
    sizes = BatchSizes(program.inputs, [tensor.shape for tensor in examples])
    rows = next((len(tensor) for spec, tensor in zip(program.inputs, examples, strict=True) if spec.batched), 0)
    near = sizes.near(_CHECKED_BATCHES) if rows else []
    failed: list[str] = []
    for size in dict.fromkeys([*near, sizes.nearest(2 * rows)]) if rows else ():
        if size not in near and not failed:
            break
        pairs = zip(program.inputs, examples, strict=True)
        worst, reason = compared.at(sizes.shape(spec, size, tensor.shape) for spec, tensor in pairs)
        if worst:
            return f"at batch {size} the captured program differs from the model ({worst})"
        if reason and size > 1:  # what takes one sample alone otherwise than several still takes any number of these
            failed.append(f"at batch {size} the model fails ({reason})")
    return failed[0] if len(failed) > 1 and _only_batches_vary(program) else ""


def wrong_size(program: Program, asked: AskedSizes, compared: Compared) -> tuple[bool, str] | None:
    """Say at which sizes that were not traced a program is not the model, and how; None if at none that were tried.

    Args:
        program: what was captured.
        asked: what the trace that it was made of asked about sizes.
        compared: it beside the model.

    Returns:
        Whether the batch is one of them, and the sentence.
    """
    examples = [tensor.shape for tensor in program.flat_examples()]

    def shapes(one: OtherSizes) -> list[list[int]]:
        return [
            [one.sizes.get((number, axis), size) for axis, size in enumerate(shape)]
            for number, shape in enumerate(examples)
        ]

    questions = list(asked.others(program.inputs))
    for others in questions:
        failed: list[str] = []
        for one in others:
            worst, reason = compared.at(shapes(one))
            if worst:
                return one.of_batch, f"at {_said(one, program)} the captured program differs from the model ({worst})"
            if not reason:
                break
            failed.append(f"at {_said(one, program)} the model fails ({reason})")
        else:  # of a batch that must be a multiple, say, and not of one that must be large enough
            rows = {one.sizes[place] > examples[place[0]][0] for one in others for place in one.asked}
            if others[0].of_batch and len(others[0].asked) == 1 and len(rows) == 2:
                return True, failed[0]
    for one in (others[-1] for others in questions):  # what is no other yet beside the traced sizes may be farther on
        if worst := compared.at(shapes(one))[0]:
            return one.of_batch, f"at {_said(one, program)} the captured program differs from the model ({worst})"
    return None


def _said(other: OtherSizes, program: Program) -> str:
    if other.of_batch and len(other.asked) == 1:
        return f"batch {other.sizes[other.asked[0]]}"
    return " and ".join(
        f"size {other.sizes[number, axis]} of axis {axis} of `{program.inputs[number].name}`"
        for number, axis in other.asked
    )


def _only_batches_vary(program: Program) -> bool:
    """Whether first axes of one size are all that is dynamic: what a model says of another is of that size alone."""
    examples = zip(program.inputs, program.flat_examples(), strict=True)
    firsts = {len(tensor) for spec, tensor in examples if spec.batched}
    return len(firsts) == 1 and not any(isinstance(size, str) for spec in program.inputs for size in spec.shape[1:])
