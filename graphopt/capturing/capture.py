"""Capture: from an `nn.Module` to a Program, by `torch.export`.

The batch axis is dynamic by default.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from graphopt.capturing.asked_sizes import AskedSizes
from graphopt.capturing.axis_names import AxisNames, declared_axes
from graphopt.capturing.checks import check_equal, check_repeatable, run_model
from graphopt.capturing.compared import Compared
from graphopt.capturing.dynamic_batch import with_dynamic_batch
from graphopt.capturing.explain import explain
from graphopt.capturing.guards import insert_guards
from graphopt.capturing.kept_axes import with_axes_kept
from graphopt.capturing.leaf_names import input_names, output_name
from graphopt.capturing.lost import lost_in_eval
from graphopt.capturing.model_calls import (
    check_keywords,
    check_module,
    check_names,
    gradients_recorded,
    in_eval_mode,
    spelled_out,
    uncompiled,
    without_compiling,
    without_fast_paths,
    without_idle_conversions,
    without_inference_tensors,
)
from graphopt.capturing.normal_form import normalise
from graphopt.capturing.safe_graphs import evaluated
from graphopt.capturing.sizes_of_one import without_ones
from graphopt.capturing.smallest_call import with_the_smallest_call
from graphopt.capturing.tied_axes import sizes_tied, torch_dims
from graphopt.capturing.wrong_sizes import wrong_batch, wrong_size
from graphopt.errors import CaptureError, ExampleError
from graphopt.ir.contents import resolved
from graphopt.ir.devices import OUT_OF_MEMORY, device_memory, device_of, held_by
from graphopt.ir.dynamic_axes import LeafShapes, arranged
from graphopt.ir.global_state import one_thread_at_a_time, outside_inference, random_state_kept
from graphopt.ir.graph import name_inputs_apart
from graphopt.ir.lifting import record_ranges
from graphopt.ir.names import Names
from graphopt.ir.program import Program
from graphopt.ir.provenance import record_capture, user_line
from graphopt.ir.regions import compiled_for_their_shapes
from graphopt.ir.signature import Note, TensorSpec, range_notes
from graphopt.ir.torch_internals import (
    arguments_by_name,
    every_question_noted,
    is_function_transform,
    output_structure,
    pytree,
    steps_stay_dynamic,
)

logger = logging.getLogger(__name__)


@one_thread_at_a_time()
@device_memory(CaptureError, "Capture the model on the CPU (`model.cpu()`), or on smaller example inputs.")
@compiled_for_their_shapes()
@random_state_kept()
@gradients_recorded()
def capture(
    model: nn.Module,
    args: Sequence[Any] | torch.Tensor,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None = None,
    *,
    share_tensors: bool = False,
) -> Program:
    """Capture `model` in eval mode as a program.

    Args:
        model: any module that `torch.export` can trace. Its mode is restored afterwards.
        args: example positional inputs, or the only one. The first axis of the first tensor that has one is the
            batch; every tensor input with the same first size shares it.
        kwargs: example keyword inputs.
        dynamic_shapes: further dynamic axes in the form `torch.export.export` takes, or by name: `{1: "tokens"}`
            in two inputs is of one size. An axis 0 given here overrides the default for that input; `{0: None}`
            makes it static.
        share_tensors: read the model's own tensors instead of copies. The model must not be trained then.

    Returns:
        A program whose outputs on the examples were compared with the model's.

    Raises:
        CaptureError: the model fails on the examples, cannot be traced, or is no function of its inputs, or the trace
            computes something else.
        UsageError: `dynamic_shapes` names an input or an axis that is not there.
    """
    check_module(model)
    model = uncompiled(model)
    check_names(model)
    args = (args,) if isinstance(args, torch.Tensor) else tuple(args)
    device = device_of(held_by(model))
    seen = {id(tensor): tensor for tensor in held_by(model).values()}

    def example(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta:
            raise CaptureError("An example input lies on the device `meta` and has no values. Give one that has.")
        found = outside_inference(resolved(tensor)).to(device)
        found = found.clone() if id(found) in seen else found  # torch takes inputs of one tensor for one input (2.13)
        return seen.setdefault(id(found), found)

    args = tuple(pytree.tree_map_only(torch.Tensor, example, args))
    kwargs = dict(pytree.tree_map_only(torch.Tensor, example, dict(kwargs or {})))
    check_keywords(kwargs)
    notes: list[Note] = []
    if isinstance(model, fx.GraphModule):  # what torch.export made refuses eval()
        model, notes = evaluated(model)
    with (
        in_eval_mode(model),
        without_compiling(model),
        without_fast_paths(),
        without_inference_tensors(model),
        spelled_out(model, kwargs),
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        args, kwargs, leaf_shapes, expected, note = _examples(model, args, kwargs, dynamic_shapes)
        program, compared = _capture(model, args, kwargs, leaf_shapes, [*note, *notes])
        program = program.to(device)  # constants in the model's code, too
        check_equal(program, expected, args, kwargs)  # of the traced size, too: a model may remember its last batch
        check_repeatable(program, args, kwargs)
        program = with_axes_kept(with_the_smallest_call(program, compared))
    return program if share_tensors else program.copy(share_tensors=False)


def from_module(
    gm: fx.GraphModule,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    leaf_shapes: LeafShapes | None = None,
) -> Program:
    """Make a program of the module of what `torch.export` returned for `args` and `kwargs`; it is changed."""
    name_inputs_apart(gm)
    gm = normalise(gm)
    insert_guards(gm)
    for node in gm.graph.nodes:
        if node.op == "call_function" and not node.users:
            node.meta.setdefault("val", None)  # a file has no value for a check (torch 2.13), a trace has None
    record_capture(gm)
    values = _input_values(gm, tuple(args), dict(kwargs))
    axes = AxisNames(values, leaf_shapes)
    inputs = tuple(
        TensorSpec(name, tuple(map(axes.of, value.shape)), value.dtype, tuple(map(axes.range_of, value.shape)))
        for name, value in values
    )
    outputs = _output_specs(gm, axes, Names(spec.name for spec in inputs))
    return Program(gm, inputs, outputs, tuple(args), dict(kwargs), tuple(range_notes(inputs)))


def _examples(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], requested: Any
) -> tuple[tuple[Any, ...], dict[str, Any], LeafShapes, Any, list[Note]]:
    """Find a batch the model takes: arguments, dynamic axes, outputs, and a note where only a batch of 1 works."""
    order = arguments_by_name(model, args, kwargs)  # as torch.export asks for dynamic axes
    kwargs = {name: kwargs[name] for name in order if name in kwargs}
    batch_args, batch_kwargs, shapes = with_dynamic_batch(model, args, kwargs, requested)
    notes = _fixed_by_example(model, batch_args, batch_kwargs, shapes)
    try:
        return batch_args, batch_kwargs, shapes, run_model(model, batch_args, batch_kwargs), notes
    except ExampleError as err:
        one_args, one_kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t[:1] if t.dim() else t, (args, kwargs))
        static = [{axis: dim for axis, dim in axes.items() if axis != 0} for axes in shapes]
        try:
            expected = run_model(model, one_args, one_kwargs)
        except ExampleError:
            raise err from None
        text = f"The batch size is fixed to 1: with more samples the model raises {err.reason}."
        logger.warning("%s", text)
        return one_args, one_kwargs, static, expected, [Note("batch", text), *notes]


def _fixed_by_example(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: LeafShapes
) -> list[Note]:
    """Say which axes were exported as dynamic and are of one size in an example, which torch.export traces as fixed."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    names, declared = input_names(model, args, kwargs), declared_axes(model, len(tensors))
    return [
        Note("sizes", f"Axis {axis} of `{name}` was exported as dynamic and is fixed: its example has a size of 1.")
        for name, tensor, own, axes in zip(names, tensors, declared, shapes, strict=True)
        for axis in own
        if axis not in axes and tensor.shape[axis] == 1
    ]


def _capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: LeafShapes, given: list[Note]
) -> tuple[Program, Compared]:
    """Export with the dynamic axes asked for; without the default batch axis where that fails or is wrong."""

    def attempt(wanted: LeafShapes) -> ExportedProgram:
        wanted_shapes = arranged(model, args, kwargs, torch_dims(wanted))
        with without_idle_conversions(), sizes_tied(model, wanted), steps_stay_dynamic(), every_question_noted():
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=wanted_shapes, strict=False)
        _check_calls(exported.graph)
        return exported

    def program(
        exported: ExportedProgram, wanted: LeafShapes, notes: Sequence[Note] = ()
    ) -> tuple[Program, Compared, str]:
        """Return the program, beside the model, and at which batch size it is not that, "" for none."""
        module = exported.module(check_guards=False)  # 2.13 adds a `_guards_fn` call without that argument
        record_ranges(module)
        asked = AskedSizes(module)
        found = from_module(module, args, kwargs, wanted)
        found = dataclasses.replace(
            found, notes=(*found.notes, *given, *notes, *lost_in_eval(model, found.graph_module))
        )
        compared = Compared(model, found)
        wrong = wrong_size(found, asked, compared)
        if wrong is not None and not wrong[0]:
            raise _DecidesBySizeError(
                f"The model cannot be captured: {wrong[1]}. It decides by size: let the axis be of one size, or "
                "the model do the same for all."
            )
        return without_ones(found, compared), compared, wrong[1] if wrong is not None else ""

    error: Exception | None = None
    try:
        captured, compared, reason = program(attempt(shapes), shapes)
        reason = reason or wrong_batch(captured, compared)
        if not reason:
            return captured, compared
    except (_UnfinishedTraceError, _DecidesBySizeError, *OUT_OF_MEMORY):
        raise
    except Exception as err:  # tracing runs the user's code, which may raise anything
        error = err
        reason = explain(err, lambda: attempt(shapes))
    static = [{axis: dim for axis, dim in axes.items() if axis != 0} for axes in shapes]
    if static == shapes:
        reason = (error and _partners(input_names(model, args, kwargs), args, kwargs, shapes, attempt)) or reason
        raise CaptureError(f"The model cannot be captured: {reason}") from error
    try:
        exported = attempt(static)
    except OUT_OF_MEMORY:
        raise
    except Exception as err:
        reason = _partners(input_names(model, args, kwargs), args, kwargs, shapes, attempt)
        reason = reason or explain(err, lambda: attempt(static))
        raise CaptureError(f"The model cannot be captured: {reason}") from err
    text = f"The batch size is fixed: {reason}"
    logger.warning("%s", text)
    captured, compared, _ = program(exported, static, [Note("batch", text)])
    return captured, compared


def _partners(
    names: Sequence[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    shapes: LeafShapes,
    attempt: Callable[[LeafShapes], object],
) -> str:
    """Say which axes of other inputs must be dynamic too, "" where no axis of the same size helps; found by trying."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    for asked, axis, dim in ((i, axis, dim) for i, axes in enumerate(shapes) for axis, dim in axes.items() if axis):
        same = [
            (other, at)
            for other, tensor in enumerate(tensors)
            for at, size in enumerate(tensor.shape)
            if at and other != asked and at not in shapes[other] and size == tensors[asked].shape[axis]
        ]
        for chosen in [*([one] for one in same), *([same] if len(same) > 1 else [])]:
            wanted = [{**axes, **{at: dim for i, at in chosen if i == leaf}} for leaf, axes in enumerate(shapes)]
            try:
                attempt(wanted)
            except OUT_OF_MEMORY:
                raise
            except Exception as err:  # tracing runs the user's code, which may raise anything
                logger.debug("not with %s: %s", chosen, err)
                continue
            options = " ".join(f"--dynamic {names[leaf]}:{at}" for leaf, at in chosen)
            others = ", ".join(f"axis {at} of `{names[leaf]}`" for leaf, at in chosen)
            return (
                f"axis {axis} of input `{names[asked]}` has the size of {others}, which is not dynamic. Add {options}, "
                "or name it in dynamic_shapes, too."
            )
    return ""


class _DecidesBySizeError(CaptureError):
    """What was traced is not the model at another size of an axis that was asked to be dynamic."""


class _UnfinishedTraceError(CaptureError):
    """The trace holds calls that only mean something while tracing."""


def _check_calls(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.op == "call_function" and is_function_transform(node.target):
            raise _UnfinishedTraceError(
                f"torch.export does not take a function transform of the model apart: it leaves `{node.name}` in the "
                "graph. Write torch.vmap out as a batched operator (torch.bmm, einsum, broadcasting)."
            )
        if getattr(node.target, "__name__", "") == "_enter_autocast":
            line = user_line(node)
            raise _UnfinishedTraceError(
                f"torch.export leaves an autocast block open{f' at {line}' if line else ''}, because there is a "
                "torch.cond, while_loop or scan in it. Let autocast begin and end inside their functions, or around "
                "the layers before and after."
            )


def _input_values(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    """List what is recorded of tensor inputs by the names of the model's arguments; FX renames some (`input_1`)."""
    given = input_names(gm, args, kwargs)
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    tensors = [node for node in placeholders if isinstance(node.meta.get("val"), torch.Tensor)]
    numbers = [node for node in placeholders if isinstance(node.meta.get("val"), torch.SymInt) and node.users]
    if numbers:  # a runtime would compute with the example's, whatever it is called with
        raise CaptureError(
            f"The input `{numbers[0]}` is a number that differs from call to call, and runtimes take tensors. Export "
            "with the number fixed (without a Dim for it), or let the model take a tensor."
        )
    labels = given if len(given) == len(tensors) and all(given) else [node.name for node in tensors]
    return [(label, node.meta["val"]) for label, node in zip(labels, tensors, strict=True)]


def _output_specs(gm: fx.GraphModule, axes: AxisNames, names: Names) -> tuple[TensorSpec, ...]:
    values = pytree.tree_leaves(next(n for n in gm.graph.nodes if n.op == "output").args[0])
    structure = pytree.tree_unflatten(list(range(len(values))), output_structure(gm))
    paths = [path for path, _ in pytree.tree_flatten_with_path(structure)[0]]
    specs = []
    for path, node in zip(paths, values, strict=True):
        if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        name = names.new(output_name(path))
        value = node.meta["val"]
        specs.append(TensorSpec(name, tuple(axes.of(size) for size in value.shape), value.dtype))
    return tuple(specs)
