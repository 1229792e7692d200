"""From a model file to a program: what `graphopt optimize PATH` does first."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from graphopt.capturing.capture import capture, from_module
from graphopt.capturing.checks import check_recorded, check_repeatable, run_model
from graphopt.capturing.example_inputs import example_inputs, open_for, random_examples
from graphopt.capturing.kept_axes import with_axes_kept
from graphopt.capturing.model_calls import (
    check_module,
    gradients_recorded,
    in_eval_mode,
    uncompiled,
)
from graphopt.capturing.safe_graphs import evaluated
from graphopt.capturing.served_head import serve
from graphopt.capturing.smallest_call import with_the_smallest_call
from graphopt.data import InputSpec, Samples
from graphopt.data.served import Served, ServedInput, advice, served_inputs
from graphopt.errors import (
    CaptureError,
    DataError,
    ExampleError,
    GraphOptError,
    LoadError,
    LoweringError,
    UsageError,
    cut,
    first_line,
    foreign_code,
    printable,
)
from graphopt.ir.devices import OUT_OF_MEMORY, check_values, held_by
from graphopt.ir.global_state import one_thread_at_a_time, random_state_kept
from graphopt.ir.program import SCHEMA, Program
from graphopt.ir.signature import Note, TensorSpec
from graphopt.ir.size_expressions import evaluate, is_expression, values_of_names
from graphopt.ir.sizes import SizeRange
from graphopt.ir.torch_internals import pytree
from graphopt.loading import LoadedModel, load_model

_SIGNATURE = "graphopt.json"


@one_thread_at_a_time()
@random_state_kept()
@gradients_recorded()
def load(
    path: str | Path | None = None,
    *,
    data: Any = None,
    inputs: Sequence[InputSpec] = (),
    trust: bool = False,
    factory: str | None = None,
    weights: str | Path | None = None,
    dynamic_shapes: Mapping[str, Any] | None = None,
    served: Served = (),
    seed: int = 0,
) -> Program:
    """Load a model file as a program. Its contents decide what it is, not its ending.

    Args:
        path: an exported program (`.pt2`), a pickled module, or with `factory` the weights.
        data: example inputs come from its first samples, where the file brings none.
        inputs: names, shapes and dtypes to make random example inputs of, for a module without data.
        trust: let the file run code (a pickle of classes other than torch.nn's own, an unchecked `.pt2`).
        factory: `package.module:function` that builds the module.
        weights: `.safetensors` or weights-only `.pt` for `factory`.
        dynamic_shapes: further dynamic axes, as `capture` takes them.
        served: inputs that the program is to take otherwise than the model, as `optimize` does.
        seed: of random example inputs.

    Raises:
        LoadError: missing, damaged, of another kind, or not trusted.
        UsageError: `inputs` or `dynamic_shapes` for what brings its own, or `served` for what is not there.
        CaptureError: not traceable, or no example inputs to trace it with.
    """
    return load_with_data(
        path,
        data=data,
        inputs=inputs,
        trust=trust,
        factory=factory,
        weights=weights,
        dynamic_shapes=dynamic_shapes,
        served=served,
        seed=seed,
    )[0]


def load_with_data(
    path: str | Path | None = None,
    *,
    data: Any = None,
    inputs: Sequence[InputSpec] = (),
    trust: bool = False,
    factory: str | None = None,
    weights: str | Path | None = None,
    dynamic_shapes: Mapping[str, Any] | None = None,
    served: Served = (),
    seed: int = 0,
) -> tuple[Program, Samples | None]:
    """Load a model file as a program, and open its data, once for both. Arguments and errors are those of `load`."""
    loaded = load_model(
        Path(path) if path is not None else None,
        trust=trust,
        factory=factory,
        weights=Path(weights) if weights is not None else None,
    )
    if inputs and (data is not None or isinstance(loaded.model, ExportedProgram)):
        brought = f"`{loaded.source}`" if isinstance(loaded.model, ExportedProgram) else "the data"
        raise UsageError(
            f"Shapes of inputs are given (--input, or inputs=...), and {brought} brings inputs of its own. "
            "Leave the shapes out."
        )
    if isinstance(loaded.model, ExportedProgram):
        return with_data(_from_file(loaded, loaded.model, dynamic_shapes), data, served=served)
    if data is not None:
        return with_data(loaded.model, data, dynamic_shapes, served=served, share_tensors=True)
    args, kwargs = random_examples(loaded.model, inputs, seed=seed, source=loaded.source)
    program = capture(loaded.model, args, kwargs, dynamic_shapes, share_tensors=True)
    return serve(program, served_inputs(served)), None


def _from_file(loaded: LoadedModel, exported: ExportedProgram, dynamic_shapes: Mapping[str, Any] | None) -> Program:
    if loaded.example_inputs is None:
        raise LoadError(
            f"`{loaded.source}` is an exported program without its example inputs, which graphopt runs to check every "
            "step. Save it with the torch.export.save of a program that still has them."
        )
    args, kwargs = loaded.example_inputs.args, loaded.example_inputs.kwargs
    signature = loaded.extra_files.get(_SIGNATURE)
    if signature is not None:
        _check_no_shapes(dynamic_shapes, f"`{loaded.source}`")
        return _that_runs(exported, args, kwargs, loaded.source, signature)
    if exported.range_constraints and dynamic_shapes is None:
        program = _that_runs(exported, args, kwargs, loaded.source)
        check_repeatable(program, args, kwargs)
        return program
    # A static program is captured again: many only became static because nobody asked for a dynamic batch.
    with foreign_code(lambda said, _: LoadError(f"`{loaded.source}` holds a program that is not whole: {said}.")):
        module = exported.module(check_guards=False)
    return capture(module, args, kwargs, dynamic_shapes, share_tensors=True)


def _that_runs(
    exported: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any], source: str, signature: str | None = None
) -> Program:
    """Return the program of a file in evaluation mode, after running it once on the inputs that the file brings.

    It has the names and the ranges of sizes of a signature that is stored beside it, otherwise those of the trace.

    Raises:
        LoadError: it does not run on them, or the signature is not its own.
        CaptureError: its values are not of the types that the file says.
    """
    try:
        module = exported.module(check_guards=False)
        assert isinstance(module, fx.GraphModule)
        gm, notes = evaluated(module)
        found = from_module(gm, args, kwargs)
        program = dataclasses.replace(found, notes=(*found.notes, *notes))
        if signature is not None:
            program = _with_signature(program, signature, source)
        # torch writes the traceback of what a graph raises by itself
        with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
            program(*args, **kwargs)
            check_recorded(program)
            if signature is None:
                program = with_the_smallest_call(program)
            program = with_axes_kept(program)
    except (GraphOptError, *OUT_OF_MEMORY):
        raise
    except Exception as err:  # a file's graph and inputs may be of any kind, and kernels raise anything
        raise LoadError(
            f"`{source}` holds a program that does not run on the example inputs stored with it: {first_line(err)}. "
            "Export it again."
        ) from err
    return program


def _check_no_shapes(dynamic_shapes: Any, program: str) -> None:
    if dynamic_shapes is not None:
        raise UsageError(
            f"Dynamic axes are given (--dynamic, or dynamic_shapes=...), and {program} is a program of graphopt's, "
            "whose axes are settled. Leave them out, or give them where the module is captured."
        )


def _with_signature(program: Program, text: str, source: str) -> Program:
    """Give a program the names and notes it was saved with.

    Raises:
        LoadError: the file's signature is damaged or not that of its program.
    """

    def specs(kind: str, found: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        pairs = zip(stored[kind], found, strict=True)
        return tuple(_renamed(spec, entry) for entry, spec in pairs)

    try:
        stored = json.loads(text)
        if stored["schema"] != SCHEMA:
            raise ValueError(f"it has schema {cut(repr(stored['schema']), 80)}, this version reads {SCHEMA}")
        found = dataclasses.replace(
            program,
            inputs=specs("inputs", program.inputs),
            outputs=specs("outputs", program.outputs),
            notes=tuple(
                Note(printable(str(note["subject"])), printable(str(note["text"]))) for note in stored["notes"]
            ),
        )
        _check_sizes(found)
        found.takes(1)  # which looks for a size that all of its ranges allow
        return found
    except (KeyError, TypeError, ValueError, RecursionError, LoweringError) as err:
        raise LoadError(
            f"`{source}` does not agree with the signature stored in it ({type(err).__name__}: {first_line(err)}). "
            "Save the program again."
        ) from err


def _check_sizes(program: Program) -> None:
    """Raise `ValueError` where what axes are called does not agree with the sizes that they have in the example."""
    pairs = [*zip(program.inputs, program.flat_examples(), strict=True)]
    values = values_of_names(pair for spec, own in pairs for pair in zip(spec.shape, own.shape, strict=True))
    odd = [name for name, value in values.items() if not 0 <= value < 1 << 63]
    if odd:
        raise ValueError(f"`{cut(odd[0], 80)}` is of no size in its example inputs")
    for spec, example in pairs:
        for axis, (size, own) in enumerate(zip(spec.shape, example.shape, strict=True)):
            if isinstance(size, str) and evaluate(size, values) not in (None, own):
                raise ValueError(f"axis {axis} of `{spec.name}` is {cut(size, 80)}, and {own} in its example inputs")


def _renamed(spec: TensorSpec, entry: Mapping[str, Any]) -> TensorSpec:
    name, shape = str(entry["name"]), entry["shape"]
    if not name.isidentifier():
        raise ValueError(f"{name!r} is no name")
    odd = [size for size in shape if isinstance(size, str) and not is_expression(size)]
    if odd:
        raise ValueError(f"{cut(repr(odd[0]), 80)} is no name of an axis")
    if [isinstance(size, str) for size in shape] != [isinstance(size, str) for size in spec.shape]:
        raise ValueError(f"`{name}` is {shape}, the program's is {spec.shape}")
    ranges = tuple(map(SizeRange.stored, entry.get("ranges", ())))
    if len(ranges) not in (0, len(shape)):
        raise ValueError(f"`{name}` has {len(ranges)} ranges of sizes for {len(shape)} axes")
    return TensorSpec(name, tuple(size if isinstance(size, str) else int(size) for size in shape), spec.dtype, ranges)


def with_data(
    model: nn.Module | Program,
    data: Any,
    dynamic_shapes: Any = None,
    *,
    served: Served = (),
    share_tensors: bool = False,
) -> tuple[Program, Samples | None]:
    """Open data once: capture a module on its first samples, unless it is a program, and bind it to the inputs.

    Raises:
        UsageError: the model is no module, a program and dynamic axes are given, or no input can be `served` so.
        DataError: there is none for a module, it cannot be read, does not fit, or the model fails on it.
        CaptureError: the model cannot be captured.
    """
    heads = served_inputs(served)
    if isinstance(model, Program):
        _check_no_shapes(dynamic_shapes, "the model")
        check_values(held_by(model.graph_module))
        program, samples = serve(model, heads), data
    else:
        check_module(model)
        if data is None:
            raise DataError(
                "A module cannot be captured without example inputs. Give data=..., or capture it first: "
                "graphopt.capture(model, (example,))."
            )
        samples = open_for(model, data)
        program = serve(capture_on(model, samples, dynamic_shapes, heads, share_tensors=share_tensors), heads)
        if program.batch_size is not None:
            _check_not_single(model, data)
    if data is None:
        return program, None
    samples = Samples.open(samples, [spec.name for spec in program.inputs]).check(program.inputs)
    return program, samples.on(program.device)


def _check_not_single(model: nn.Module, data: Any) -> None:
    """Refuse a list of single samples, of which each would be taken for a batch.

    Raises:
        DataError: the model takes two of them stacked, and makes of each what it makes of it alone.
    """
    if not isinstance(data, list) or len(data) < 2:
        return
    if not all(isinstance(one, torch.Tensor) and one.shape == data[0].shape for one in data[:2]):
        return
    try:
        with in_eval_mode(model), torch.no_grad():
            together = run_model(model, (torch.stack(data[:2]),), {})
            alone = [run_model(model, (one,), {}) for one in data[:2]]
    except CaptureError:
        return
    if all(
        whole.shape == (2, *part.shape) and torch.allclose(whole[index], part, rtol=1e-3, atol=1e-4)
        for index, one in enumerate(alone)
        for whole, part in zip(pytree.tree_leaves(together), pytree.tree_leaves(one), strict=True)
        if isinstance(part, torch.Tensor)
    ):
        raise DataError(
            f"The data is a list of {len(data)} single samples of shape {tuple(data[0].shape)}, and what is gone "
            "through is taken for batches. Give one tensor, data=torch.stack(data), or batches of several samples."
        )


def capture_on(
    model: nn.Module,
    data: Any,
    dynamic_shapes: Any = None,
    served: Sequence[ServedInput] = (),
    *,
    share_tensors: bool = False,
) -> Program:
    """Capture a module on what it takes of the first samples of its data, some of which may be as `served`.

    Raises:
        DataError: the data cannot be read, or the model fails on them.
        CaptureError: the model cannot be captured.
    """
    model, samples = uncompiled(model), open_for(model, data)
    args, kwargs = example_inputs(model, samples, served)
    try:
        return capture(model, args, kwargs, dynamic_shapes, share_tensors=share_tensors)
    except ExampleError as err:
        own_args, own_kwargs = example_inputs(model, samples, served, whole=True)
        with contextlib.suppress(ExampleError):  # a model may take batches of one size only: that of its data
            return capture(model, own_args, own_kwargs, dynamic_shapes, share_tensors=share_tensors)
        shapes = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (*args, *kwargs.values()))
        of_bytes = [name for name, t in zip(samples.names, samples.first(1), strict=True) if t.dtype is torch.uint8]
        hint = f", or {advice(of_bytes[0], torch.uint8)}" if of_bytes and not served else ""
        raise DataError(
            f"The model fails on the first samples of the data ({shapes}): {err.reason}. Give samples of the shape and "
            f"dtype that the model takes{hint}."
        ) from err
