"""Lets a program take its inputs as they are served.

    f(x), x float    ->    f((permute(to(x, float)) - shift) * factor), x uint8

The product stands last: `fold` takes it into a convolution behind it whatever lies between, the difference where no
zero padding does. What is 0 or 1 is left out.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphopt.data.served import ServedInput
from graphopt.errors import UsageError
from graphopt.ir.editor import Editor
from graphopt.ir.graph import behind_inputs
from graphopt.ir.program import Program
from graphopt.ir.signature import Note, TensorSpec
from graphopt.ir.torch_internals import OpOverload

aten = torch.ops.aten


def serve(program: Program, served: Sequence[ServedInput]) -> Program:
    """Return a program that takes inputs as they are served; its examples are served likewise.

    Raises:
        UsageError: the program has no such input, or it cannot be served so.
    """
    if not served:
        return program
    by_name = {one.name: one for one in served}
    names = [spec.name for spec in program.inputs]
    for name in by_name.keys() - set(names):
        near = difflib.get_close_matches(name, names, 1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise UsageError(f"The model has no input `{name}` to be served; it takes {', '.join(names)}.{hint}")
    result = program.copy()
    editor = Editor(result.graph_module, "served")
    placeholders = [
        node for node in editor.graph.find_nodes(op="placeholder") if isinstance(node.meta.get("val"), torch.Tensor)
    ]
    inputs, examples = list(program.inputs), list(program.flat_examples())
    for index, (node, spec) in enumerate(zip(placeholders, program.inputs, strict=True)):
        if spec.name in by_name:
            inputs[index] = _head(editor, node, spec, by_name[spec.name])
            examples[index] = by_name[spec.name].served(examples[index])
    args, kwargs = program.unflatten(examples)
    return dataclasses.replace(
        result.with_graph(editor.finish()),
        inputs=tuple(inputs),
        example_args=args,
        example_kwargs=kwargs,
        notes=(*program.notes, *(Note("inputs", f"`{one.name}` is taken as it is served, {one}") for one in served)),
    )


def _head(editor: Editor, node: fx.Node, spec: TensorSpec, served: ServedInput) -> TensorSpec:
    """Insert what makes of an input what readers of `node` take; return what is served."""
    order = served.order(len(spec.shape))
    back = sorted(order, key=order.__getitem__)
    users, taken = list(node.users), node.meta["val"]
    value = node
    with editor.graph.inserting_before(behind_inputs(node).next):
        steps = _steps(editor, node, spec, served)
        node.meta["val"] = taken.new_empty([taken.shape[axis] for axis in back], dtype=served.dtype)
        node.meta.pop("tensor_meta", None)
        for target, operands in steps:
            value = editor.call(target, value, *operands, like=node, site=spec.name)
    for user in users:
        user.replace_input_with(node, value)
    editor.propagate_from(users)
    ranges = tuple(spec.range_of(axis) for axis in back)
    return TensorSpec(spec.name, tuple(spec.shape[axis] for axis in back), served.dtype, ranges)


_Step = tuple[OpOverload, tuple[Any, ...]]


def _steps(editor: Editor, node: fx.Node, spec: TensorSpec, served: ServedInput) -> list[_Step]:
    """Return the calls, with their operands behind the first; those that would change nothing are left out."""
    if not spec.dtype.is_floating_point:
        dtype = str(spec.dtype).removeprefix("torch.")
        raise UsageError(
            f"Input `{spec.name}` takes {dtype}, of which nothing has to be made. Do not say how it is served."
        )
    order = served.order(len(spec.shape))
    computed = torch.float64 if spec.dtype is torch.float64 else torch.float32
    shift, factor = served.affine(spec.shape)
    steps: list[_Step] = []
    if served.dtype is not computed:  # first: TensorRT moves no bytes
        steps.append((aten.to.dtype, (computed,)))
    if served.layout:
        steps += [(aten.permute.default, (order,)), (aten.contiguous.default, ())]
    if bool((shift != 0).any()):
        steps.append((aten.sub.Tensor, (_operand(editor, node, shift.to(computed)),)))
    if bool((factor != 1).any()):
        steps.append((aten.mul.Tensor, (_operand(editor, node, factor.to(computed)),)))
    if spec.dtype is not computed:
        steps.append((aten.to.dtype, (spec.dtype,)))
    if not steps:
        raise UsageError(f"Input `{spec.name}` is served as the model takes it. Do not say how it is served.")
    return steps


def _operand(editor: Editor, node: fx.Node, values: torch.Tensor) -> fx.Node | float:
    """Return one number as it is, and several as the read of a new buffer."""
    if not values.dim():
        return float(values)
    return editor.read(editor.put(editor.new_name(f"served_{node.name}"), values), like=node)
