"""An axis of any size is an axis of one, too: `squeeze` keeps it, as torch records while it traces larger ones.

    x.mean((2, 3), keepdim=True).squeeze()      (batch, 8, 1, 1) -> (batch, 8), and (8,) for one sample
    squeeze(x, dim=[2, 3])                      (batch, 8) for any number

Every pass and every runtime believes what is recorded. What the program said of one sample before is compared: other
numbers, and one is no size that the program takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from graphopt.capturing.checks import close, resized, run_program, tolerance
from graphopt.capturing.smallest_call import bound_to
from graphopt.errors import CaptureError
from graphopt.ir.buffers import with_its_buffers
from graphopt.ir.graph import arguments
from graphopt.ir.program import Program
from graphopt.ir.provenance import user_line
from graphopt.ir.regions import every_graph_module
from graphopt.ir.signature import Note, TensorSpec
from graphopt.ir.sizes import SizeRange
from graphopt.ir.torch_internals import free_unbacked_symbols, pytree

aten = torch.ops.aten
_SQUEEZES = {aten.squeeze, aten.squeeze_copy}
_LARGEST = 64  # sizes of inputs that are looked at for what makes an axis one


def with_axes_kept(program: Program) -> Program:
    """Return a program whose `squeeze` keeps dynamic axes, whatever their size.

    Returns:
        A program that gives the same numbers, in outputs that may have more axes of one, which a note says; or that
        takes no such size.
    """
    if not any(_squeezes(node) for gm in every_graph_module(program.graph_module) for node in gm.graph.nodes):
        return program
    kept = program.copy()
    squeezed = [found for gm in every_graph_module(kept.graph_module) for found in _keep(gm)]
    for line, size in squeezed:
        kept = _compared(program, kept, line, size)
    return kept if squeezed else program


def _squeezes(node: fx.Node) -> bool:
    return getattr(node.target, "overloadpacket", None) in _SQUEEZES


def _keep(gm: fx.GraphModule) -> Iterator[tuple[str, Any]]:
    """Let calls squeeze axes of one size only; yield the line of each, and each dynamic size that it keeps."""
    for node in list(gm.graph.nodes):
        if not _squeezes(node):
            continue
        given = arguments(node, ())
        shape = given["self"].meta["val"].shape
        asked = given.get("dim", range(len(shape)))
        axes = [axis % len(shape) for axis in ([asked] if isinstance(asked, int) else asked)] if shape else []
        dynamic = [shape[axis].node.expr for axis in axes if isinstance(shape[axis], torch.SymInt)]
        if not dynamic or free_unbacked_symbols(given["self"].meta["val"]):  # of one by chance, as data have it
            continue
        fixed = [axis for axis in axes if not isinstance(shape[axis], torch.SymInt) and shape[axis] == 1]
        yield from ((user_line(node), size) for size in dynamic)
        if fixed:
            node.target, node.args, node.kwargs = aten.squeeze.dims, (given["self"], fixed), {}
        elif given["self"].op in ("placeholder", "get_attr"):  # which no output may be
            node.target, node.args, node.kwargs = aten.clone.default, (given["self"],), {}
        else:
            node.replace_all_uses_with(given["self"])
            gm.graph.erase_node(node)
    gm.recompile()


def _compared(program: Program, kept: Program, line: str, size: Any) -> Program:
    """Return the second program, bound to sizes that leave an axis larger than one where the two compute otherwise."""
    symbols = size.free_symbols
    ones = [value for value in range(1, _LARGEST) if int(size.subs(dict.fromkeys(symbols, value))) == 1]
    if not ones:
        return kept
    inputs = _at(kept, dict.fromkeys(symbols, ones[0]))
    if inputs is None:
        return kept
    try:
        want, got = (_run(one, inputs) for one in (program, kept))
    except CaptureError:  # of no such size: that is known by another check
        return kept
    relative = tolerance(program)
    pairs = [*zip(want, got, strict=True)]
    if all(w.numel() == g.numel() and close(w.flatten(), g.flatten(), relative) for w, g in pairs):
        output = next((index for index, (w, g) in enumerate(pairs) if w.shape != g.shape), None)
        if output is None:
            return kept
        text = (
            f"Where `{_name(kept, symbols)}` is {ones[0]}, output `{kept.outputs[output].name}` is "
            f"{tuple(got[output].shape)}: it keeps its axes. The model gives {tuple(want[output].shape)}, by "
            f"`squeeze`{f' at {line}' if line else ''}."
        )
        return dataclasses.replace(kept, notes=(*dict.fromkeys((*kept.notes, Note("batch", text))),))
    above = dict.fromkeys(symbols, ones[-1] + 1)
    return bound_to(kept, [_narrowed(spec, _shape(kept, number), above) for number, spec in enumerate(kept.inputs)])


def _shape(program: Program, number: int) -> Sequence[Any]:
    """Return the sizes of an input, as torch's expressions where they are dynamic."""
    values = [node.meta["val"] for node in program.graph.find_nodes(op="placeholder")]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return [size.node.expr if isinstance(size, torch.SymInt) else size for size in tensors[number].shape]


def _name(program: Program, symbols: Collection[Any]) -> str:
    """Return what the first axis that depends on a symbol is called."""
    return next(
        str(spec.shape[axis])
        for number, spec in enumerate(program.inputs)
        for axis, size in enumerate(_shape(program, number))
        if not isinstance(size, int) and not size.free_symbols.isdisjoint(symbols)
    )


def _at(program: Program, values: dict[Any, int]) -> list[torch.Tensor] | None:
    """Return examples at sizes that symbols have, None where an input may not have them."""
    inputs = []
    for number, (spec, tensor) in enumerate(zip(program.inputs, program.flat_examples(), strict=True)):
        shape = [*tensor.shape]
        for axis, size in enumerate(_shape(program, number)):
            if not isinstance(size, int) and size.free_symbols <= {*values}:
                shape[axis] = int(size.subs(values))
                if shape[axis] not in spec.range_of(axis):
                    return None
        inputs.append(resized(tensor, shape))
    return inputs


def _narrowed(spec: TensorSpec, shape: Sequence[Any], least: dict[Any, int]) -> TensorSpec:
    ranges = [
        spec.range_of(axis) & SizeRange(int(size.subs(least)))
        if not isinstance(size, int) and size.free_symbols and size.free_symbols <= {*least}
        else spec.range_of(axis)
        for axis, size in enumerate(shape)
    ]
    return dataclasses.replace(spec, ranges=tuple(ranges))


def _run(program: Program, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    args, kwargs = program.unflatten(inputs)
    with with_its_buffers(program.graph_module), torch.no_grad():
        found = run_program(program, args, kwargs)
    return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)]
