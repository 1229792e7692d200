"""Exporting a program again: what saving writes and lowering translates."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx
from torch.export import ExportedProgram

from graphopt.errors import CaptureError, first_line
from graphopt.ir.batch_sizes import BatchSizes
from graphopt.ir.devices import OUT_OF_MEMORY
from graphopt.ir.dynamic_axes import LeafShapes, arranged, bound_dim
from graphopt.ir.graph import copy_graph_module
from graphopt.ir.lifting import lifted
from graphopt.ir.provenance import custom_notes, drop_process_traces
from graphopt.ir.regions import every_graph_module
from graphopt.ir.signature import TensorSpec
from graphopt.ir.size_expressions import linear
from graphopt.ir.sizes import SizeRange
from graphopt.ir.torch_internals import SMALLEST_TRACED, steps_stay_dynamic
from graphopt.ir.training import set_training

_SOURCE = "graphopt.source"  # in meta["custom"] while exporting, which renames nodes


class Exportable(Protocol):
    """What of a `Program` is exported: the graph, and how it is called."""

    @property
    def graph_module(self) -> fx.GraphModule:
        """The graph."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Its tensor inputs, whose dynamic axes have names."""

    @property
    def example_args(self) -> tuple[Any, ...]:
        """Positional example inputs."""

    @property
    def example_kwargs(self) -> Mapping[str, Any]:
        """Keyword example inputs."""


@dataclass(frozen=True, slots=True)
class Exported:
    """An export of a program, for reading: whoever asks for the same program gets the same object.

    Attributes:
        program: with the program's own signature and dynamic axes.
        sources: the program's name of each exported call.
    """

    program: ExportedProgram
    sources: Mapping[str, str]


_known: weakref.WeakKeyDictionary[Exportable, tuple[object, Exported]] = weakref.WeakKeyDictionary()


def exported(program: Exportable) -> Exported:
    """Export `program` in evaluation mode, once for as long as its graph stands, without a trace where none is needed.

    Raises:
        CaptureError: as `export_again`.
    """
    state = _state(program.graph_module)
    known, found = _known.get(program, (None, None))
    if found is None or known != state:
        found = _lifted(program) or _export(program, _named(program.graph_module, evaluated=True))
        _known[program] = (state, found)
    return found


def let_exports_read(program: Exportable, others: Mapping[int, torch.Tensor], before: Exportable) -> None:
    """Take over what was exported of a program that was the same, but for tensors of equal values.

    Args:
        program: now reads others.
        others: they, by the ids of those in their place.
        before: the same program, or the one it is a copy of, which is exported anew.
    """
    if before in _known:
        _, found = _known.pop(before)
        for table in (found.program.state_dict, found.program.constants):
            table.update({name: others[id(held)] for name, held in table.items() if id(held) in others})
        _known[program] = (_state(program.graph_module), found)


def _state(gm: fx.GraphModule) -> object:
    """Return what tells whether a graph was changed in place, as putting it in training mode does."""
    graphs = [str(module.graph) for module in every_graph_module(gm)]
    return graphs, [id(tensor) for tensor in (*gm.parameters(), *gm.buffers())]


def export_again(program: Exportable) -> Exported:
    """Export the graph of `program` with its own signature and dynamic axes.

    Raises:
        CaptureError: a rewrite tied a dynamic axis to one size; the message names it.
    """
    return _export(program, _named(program.graph_module))


def _lifted(program: Exportable) -> Exported | None:
    gm = copy_graph_module(program.graph_module)
    set_training(gm, False)
    found = lifted(gm, program.inputs, tuple(program.example_args), program.example_kwargs)
    if found is None:
        return None
    return Exported(found, {node.name: node.name for node in found.graph.nodes if node.op == "call_function"})


def _export(program: Exportable, gm: fx.GraphModule) -> Exported:
    shapes = _axes(program.inputs)
    args, kwargs = tuple(program.example_args), dict(program.example_kwargs)
    with warnings.catch_warnings(), steps_stay_dynamic(), torch.no_grad():  # as it was captured
        warnings.simplefilter("ignore")
        try:
            again = torch.export.export(
                gm, args, kwargs, dynamic_shapes=arranged(gm, args, kwargs, shapes), strict=False
            )
        except OUT_OF_MEMORY:
            raise
        except Exception as err:  # torch.export lets through whatever a kernel or a guard raises
            raise CaptureError(
                f"The rewritten program cannot be exported again: {first_line(err)}. This is a bug in the pass that "
                "ran last; `graphopt optimize --check full` names it."
            ) from err
    sources = {}
    for node in (node for module in every_graph_module(again.graph_module) for node in module.graph.nodes):
        notes = custom_notes(node)
        if _SOURCE in notes:
            source = notes.pop(_SOURCE)
            node.meta["custom"] = notes
            if node.graph is again.graph:
                sources[node.name] = source  # what is in a body has the name of the call that holds it
    drop_process_traces(again.graph_module)
    return Exported(again, sources)


def _axes(inputs: Sequence[TensorSpec]) -> LeafShapes:
    """Return the dynamic axes of inputs, with the sizes they are bound to.

    Named are only those that torch takes under no other form (2.13): multiples of what no axis is alone, and an axis of
    at most 2. Of a name torch proves that all sizes will do, which one question of a kernel about one refutes.
    """
    sizes = BatchSizes(inputs)
    alone = {size for spec in inputs for size in spec.shape}
    root = {} if not sizes.symbol or sizes.symbol in alone else {sizes.symbol: bound_dim(sizes.values, sizes.symbol)}
    small = {
        size: bound_dim(bound, size)
        for spec in inputs
        for size, bound in zip(spec.shape, spec.ranges, strict=False)
        if isinstance(size, str) and size.isidentifier() and bound.most == SMALLEST_TRACED
    }
    named = {**small, **root}

    def dim(size: str, sizes: SizeRange) -> Any:
        line = linear(size)
        if line is None or line.name not in named or line.factor < 1:
            return bound_dim(sizes)
        multiple = named[line.name] * line.factor if line.factor > 1 else named[line.name]
        return multiple + line.offset if line.offset else multiple

    return [
        {axis: dim(size, spec.range_of(axis)) for axis, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in inputs
    ]


def _named(gm: fx.GraphModule, *, evaluated: bool = False) -> fx.GraphModule:
    """Return a copy, evaluated if wanted, in which every call carries its name as metadata that survives export."""
    named = copy_graph_module(gm)
    if evaluated:
        set_training(named, False)
    for node in named.graph.nodes:
        if node.op == "call_function":
            node.meta["custom"] = {**custom_notes(node), _SOURCE: node.name}
    return named
