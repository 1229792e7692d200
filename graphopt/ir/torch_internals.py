"""The one door to what torch keeps private: nobody else imports `torch._*` or `torch.fx.experimental`.

Names as torch 2.11 to 2.14 have them; `tests/graphopt/ir/test_torch_internals.py` fails where one moves or means
something else. Where versions differ, the difference is settled here.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any
from unittest import mock

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx
from torch._decomp import decomposition_table, decompositions
from torch._dispatch.python import enable_python_dispatcher  # without it aten.pad fixes a symbolic batch to its hint
from torch._export import utils as export_utils  # where an export looks for operators
from torch._export.verifier import TrainingIRVerifier  # of what an export gives; a program by default is stricter
from torch._guards import detect_fake_mode  # the mode of recorded values: their symbols belong to it
from torch._ops import HigherOrderOperator, OperatorBase, OpOverload, OpOverloadPacket  # what graphs call
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # what `meta["val"]` holds
from torch.export import ExportedProgram
from torch.export.dynamic_shapes import _combine_args  # the names that dynamic shapes are given under
from torch.fx._pytree import tree_flatten_spec  # what the code of an exported graph flattens its inputs with
from torch.fx.experimental import symbolic_shapes
from torch.fx.experimental.proxy_tensor import make_fx  # traces one operator into what it decomposes to
from torch.fx.experimental.symbolic_shapes import (
    ShapeEnv,
    free_symbols,
    free_unbacked_symbols,
    statically_known_true,
)
from torch.utils import _pytree as pytree  # `torch.utils.pytree` lacks TreeSpec's fields and key paths (2.13)
from torch.utils._sympy.interp import sympy_interp  # computes what sympy would simplify
from torch.utils._sympy.reference import PythonReferenceAnalysis
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from graphopt.ir.global_state import one_thread_at_a_time
from graphopt.ir.sizes import SizeRange

__all__ = [
    "DECOMPOSITIONS",
    "SHAPES_LOGGER",
    "SMALLEST_TRACED",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "OperatorBase",
    "PythonReferenceAnalysis",
    "ShapeEnv",
    "TrainingIRVerifier",
    "arguments_by_name",
    "blend_each",
    "calling_convention",
    "check_traced",
    "compiled_module",
    "compiler_settings",
    "copy_code_generator",
    "copy_structures",
    "detect_fake_mode",
    "enable_python_dispatcher",
    "every_question_noted",
    "flat_arguments",
    "free_symbols",
    "free_unbacked_symbols",
    "is_compiled",
    "is_composite",
    "is_function_transform",
    "load_pt2",
    "make_fx",
    "multiply_each",
    "onnx_exporter",
    "optimization_hint",
    "output_structure",
    "pytree",
    "range_asked",
    "range_of",
    "recurrent_results",
    "save_pt2",
    "set_output_structure",
    "statically_known_true",
    "steps_stay_dynamic",
    "sympy_interp",
    "target_of_conversion",
]

SMALLEST_TRACED = 2  # as any size: torch.export specialises what is 0 or 1
DECOMPOSITIONS = decompositions.__file__  # where a trace unrolls the steps of recurrent layers (2.13)
_ANY_STEPS = (torch.ops.aten.lstm.input, torch.ops.aten.gru.input)  # not RNNs, which ONNX exports take apart
SHAPES_LOGGER = symbolic_shapes.__name__  # where torch logs which line of a model guarded on a size


def optimization_hint(size: int | torch.SymInt, fallback: int) -> int:
    """Return a size of the example, without guarding on it.

    For one that depends on data it is `fallback`, or the nearest that the model has checked it to be.
    """
    if hasattr(symbolic_shapes, "optimization_hint"):
        return int(symbolic_shapes.optimization_hint(size, fallback=fallback))
    # torch 2.11, where what a size must be does not count
    hint = symbolic_shapes.size_hint(size, fallback=fallback)  # type: ignore[attr-defined]
    if not isinstance(size, torch.SymInt):
        return int(hint)
    bounds = size.node.shape_env.bound_sympy(size.node.expr)
    return int(min(max(hint, bounds.lower), bounds.upper))


@contextlib.contextmanager
def every_question_noted() -> Iterator[None]:
    """Have a trace note what it asks of sizes of inputs, though what was asked before implies the answer.

    torch narrows what a size may be by each answer, and notes nothing that follows: neither `s < 16`, which kernels ask
    and are the same for all, nor then a model's own `s < 20` (2.11 to 2.14).
    """
    narrow = ShapeEnv._refine_ranges

    def refine(env: ShapeEnv, answer: Any) -> None:
        if isinstance(answer, sympy.Eq) or not answer.free_symbols <= env.backed_var_to_val.keys():
            narrow(env, answer)

    with mock.patch.object(ShapeEnv, "_refine_ranges", refine):
        yield


def check_traced(condition: bool | torch.SymBool, said: str) -> None:
    """Let a trace know that a condition on sizes holds, and raise `said` where it does not."""
    torch._check(condition, lambda: said)  # type: ignore[no-untyped-call]


def range_of(size: torch.SymInt) -> SizeRange:
    """Return which sizes an axis may have; what begins at 2 begins at 0, and what grows with it there.

    torch traces what may be 0 or 1 as 2 or more, and lets these through where it checks ranges (2.13).
    """
    expression, known = size.node.expr, size.node.shape_env.var_to_range
    ranges = {symbol: known[symbol] for symbol in expression.free_symbols}
    widened = {symbol: ValueRanges(_least(int(r.lower)), r.upper) for symbol, r in ranges.items()}
    found = bound_sympy(expression, widened)
    return _range(max(int(found.lower), 0), int(found.upper) if found.upper.is_Integer else None)


def range_asked(dim: Any) -> SizeRange:
    """Return the same of a `Dim`, or of a hint like `Dim.DYNAMIC(min=4)`."""
    least, most = getattr(dim, "min", None), getattr(dim, "max", None)
    return _range(least if isinstance(least, int) else 0, most if isinstance(most, int) else None)


def _range(least: int, most: int | None) -> SizeRange:
    return SizeRange(_least(least), most)


def _least(size: int) -> int:
    return 0 if size <= SMALLEST_TRACED else size


def arguments_by_name(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return positional and keyword arguments under the names that `torch.export` knows them by."""
    combined: dict[str, Any] = _combine_args(module, args, kwargs)
    return combined


def flat_arguments(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return what each placeholder of a graph takes when its module is called with these arguments."""
    structure = getattr(gm, "_in_spec", None)
    if structure is None:  # a graph that was not exported takes its arguments as they stand
        return [*args, *kwargs.values()]
    values = [*arguments_by_name(gm, args, kwargs).values()]  # by position or by name, whichever the example was given
    positional, named = structure.children()
    count = positional.num_children
    return list(tree_flatten_spec((values[:count], dict(zip(named.context, values[count:], strict=True))), structure))


def output_structure(gm: fx.GraphModule) -> pytree.TreeSpec:
    """Return how the results of an exported graph are arranged."""
    structure = gm._out_spec
    assert isinstance(structure, pytree.TreeSpec)  # torch.export always sets it
    return structure


def forget_guards(program: ExportedProgram) -> None:
    """Drop what an exported program would assert of sizes, which it reads off its symbols when it is made (2.13)."""
    program._guards_code = []


def calling_convention(graph: fx.Graph) -> tuple[list[str], pytree.TreeSpec, pytree.TreeSpec] | None:
    """Return the names of a graph's arguments, and how they and its results are arranged; None for a plain graph."""
    info = getattr(graph._codegen, "pytree_info", None)
    if info is None or info.out_spec is None:
        return None
    return list(info.orig_args), info.in_spec, info.out_spec


def copy_structures(source: fx.GraphModule, target: fx.GraphModule) -> None:
    """Let a module be called as `source` is: with the same arguments, for results arranged alike."""
    for name in ("_in_spec", "_out_spec"):
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))


def copy_code_generator(source: fx.GraphModule, target: fx.Graph) -> None:
    """Let a graph generate the code that the graph of `source` does: names of arguments, structures."""
    target.set_codegen(source.graph._codegen)


def set_output_structure(gm: fx.GraphModule, structure: pytree.TreeSpec) -> None:
    """Arrange the results of a graph in another structure.

    Generated code reads it from the module, the interpreter from the code generator (torch 2.13).
    """
    generator: Any = copy.copy(gm.graph._codegen)
    generator.pytree_info = generator.pytree_info._replace(out_spec=structure)
    gm.graph.set_codegen(generator)
    gm._out_spec = structure


def compiled_module(module: torch.nn.Module) -> torch.nn.Module | None:
    """Return the module that `torch.compile` wrapped in `module`; None if that is no such wrapper."""
    wraps = type(module).__name__ == "OptimizedModule"  # importing torch._dynamo for its class would cost a second
    original = getattr(module, "_orig_mod", None)
    return original if wraps and isinstance(original, torch.nn.Module) else None


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether `torch.compile` wraps a module, or the module was told to compile itself."""
    return compiled_module(module) is not None or module._compiled_call_impl is not None


def target_of_conversion(*args: Any, **kwargs: Any) -> tuple[torch.device | None, torch.dtype | None, Any]:
    """Read the arguments of `Module.to`: device, dtype and memory format."""
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    return device, dtype, memory_format


def is_composite(operator: OpOverload[..., Any]) -> bool:
    """Whether an operator is written in terms of others, so that tracing takes it apart whatever the table says."""
    return operator.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


def is_function_transform(target: Any) -> bool:
    """Whether a call target belongs to `torch.func`, whose calls mean something while tracing only."""
    return str(getattr(target, "__module__", "")).startswith("torch._functorch")


def recurrent_results(target: Any, args: tuple[Any, ...]) -> tuple[torch.Tensor, ...] | None:
    """Return results of an LSTM or GRU over a dynamic number of steps, with nothing in them; None for any other call.

    torch takes the steps one by one to know these shapes, which fixes their number (2.13).
    """
    if target not in _ANY_STEPS or len(args) != len(target._schema.arguments) or args[0].dim() != 3:
        return None
    x, states, bidirectional, batch_first = args[0], args[1], args[-2], args[-1]
    x = x.transpose(0, 1) if batch_first else x  # as kernels compute: their result is turned around, not copied
    steps = x.shape[0]
    if not isinstance(steps, torch.SymInt) or steps.node.expr.is_number:
        return None
    states = [states] if isinstance(states, torch.Tensor) else states
    width = states[0].shape[-1] * (2 if bidirectional else 1)
    result = x.new_empty((*x.shape[:2], width))
    result = result.transpose(0, 1) if batch_first else result
    return result, *(state.new_empty(state.shape) for state in states)


@contextlib.contextmanager
def steps_stay_dynamic() -> Iterator[None]:
    """Trace LSTMs and GRUs for any number of steps: for traces that leave them whole, as results are empty."""
    keys = (torch._C.DispatchKey.Autograd, torch._C.DispatchKey.CompositeImplicitAutograd)

    def whole(operator: OpOverload[..., Any], kernel: Any) -> Any:
        @functools.wraps(kernel)
        def call(*args: Any) -> Any:
            found = recurrent_results(operator, args)
            return kernel(*args) if found is None else found

        return call

    with one_thread_at_a_time(), contextlib.ExitStack() as stack:
        for operator in _ANY_STEPS:
            stack.callback(operator._dispatch_cache.clear)
            kernels = {key: whole(operator, operator.py_kernels[key]) for key in keys}
            stack.enter_context(mock.patch.dict(operator.py_kernels, kernels))
            without_dispatcher = {operator: whole(operator, decomposition_table[operator])}
            stack.enter_context(mock.patch.dict(decomposition_table, without_dispatcher))
            operator._dispatch_cache.clear()
        yield


def load_pt2(stream: IO[bytes]) -> tuple[dict[str, ExportedProgram], dict[str, str]]:
    """Load the programs and the extra files of a `.pt2`. It runs what is in it.

    `torch.export.load` hides the reason of a failure. Loading torch's reader takes seconds.
    """
    from torch.export.pt2_archive._package import load_pt2 as load

    contents = load(stream)
    return contents.exported_programs, contents.extra_files


def save_pt2(program: ExportedProgram, stream: IO[bytes], extra_files: dict[str, Any]) -> None:
    """Write a program as `torch.export.save` does, and do not put a copy of it in order beside.

    torch does that to see whether it can be done, drops it, and takes a third of its time for it (2.11 to 2.14).
    """
    from torch._export.serde import serialize

    with one_thread_at_a_time(), mock.patch.object(serialize, "canonicalize"):
        torch.export.save(program, stream, extra_files=extra_files)


@functools.cache
def _kept_signatures() -> tuple[property, Any]:
    """Return what the exporter reads off the source of each function of its library, which never changes, kept."""
    from onnxscript.values import TracedOnnxFunction
    from torch.onnx._internal.exporter import _schemas

    read: Any = TracedOnnxFunction.function_ir
    return property(functools.cache(read.fget)), functools.cache(_schemas.op_signature_from_function)


@functools.cache
def _reading_what_is_recorded() -> type[fx.Interpreter]:
    """Return what the exporter looks for promoted types with, without running calls that it leaves as they are."""
    from torch.onnx._internal.fx.passes import type_promotion

    class Reading(type_promotion._TypePromotionInterpreter):
        _node: fx.Node
        _changed = False  # from the first call on that is, values are others than recorded

        def run_node(self, n: fx.Node) -> Any:
            self._node = n
            return super().run_node(n)

        def _run_node_and_set_meta(self, node: fx.Node) -> Any:  # of what is new, or has new arguments
            self._changed = True
            return super()._run_node_and_set_meta(node)

        def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            recorded = None if self._changed else self._node.meta.get("val")
            return super().call_function(target, args, kwargs) if recorded is None else recorded

    return Reading


@contextlib.contextmanager
def onnx_exporter() -> Iterator[None]:
    """Have `torch.onnx.export` to one's own thread, without what it does over and over.

    It reads its whole library of translations in every export, a second of each (2.13): now the source of a function
    is read once in a process, and what was registered since the last export is there. For new composite operators it
    looks in every namespace, several times in an export and a quarter of a second of each: once meanwhile. To promote
    types it runs on fake tensors what it has just traced on them: as far as nothing is promoted it reads them. The
    optimizer behind it takes 1e-8 for 0, 1.00001 for 1, and Relu(Clip(x, -3, -1)) for -1 (onnxscript 0.7): all stay.
    """
    from onnxscript import rewriter
    from onnxscript.rewriter.rules.common import _fuse_relus_clips, _no_op
    from onnxscript.values import TracedOnnxFunction
    from torch.onnx._internal.exporter import _schemas
    from torch.onnx._internal.fx.passes import type_promotion

    with one_thread_at_a_time(), steps_stay_dynamic():
        function_ir, signature = _kept_signatures()
        looked_for = functools.cache(export_utils._materialize_cpp_cia_ops)
        inexact = [*_no_op.rules, *_fuse_relus_clips.rules]
        exact = tuple(rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule not in inexact)
        with (
            mock.patch.object(TracedOnnxFunction, "function_ir", function_ir),
            mock.patch.object(_schemas, "op_signature_from_function", signature),
            mock.patch.object(export_utils, "_materialize_cpp_cia_ops", looked_for),
            mock.patch.object(rewriter, "_DEFAULT_REWRITE_RULES", exact),
            mock.patch.object(type_promotion, "_TypePromotionInterpreter", _reading_what_is_recorded()),
        ):
            yield


def compiler_settings(**settings: Any) -> contextlib.AbstractContextManager[None]:
    """Change settings of `torch.compile` meanwhile. It is loaded now, which costs a second."""
    import torch._dynamo

    changed: contextlib.AbstractContextManager[None] = torch._dynamo.config.patch(**settings)
    return changed


def _record_states_of_lstms() -> None:
    """Let torch 2.11 record the states of an LSTM as it computes them: it leaves them a dimension too many."""
    from torch._decomp import decompositions

    given: Callable[..., Any] = decompositions.one_layer_lstm

    @functools.wraps(given)
    def mended(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        outputs, states = given(*args, **kwargs)
        return outputs, tuple(state if state.dim() == 2 else state.squeeze(0) for state in states)

    decompositions.one_layer_lstm = mended


if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12):
    _record_states_of_lstms()


def multiply_each(tensors: Sequence[torch.Tensor], factors: Sequence[float]) -> None:
    """Multiply each tensor by its factor, in place, in one call for all of them."""
    if tensors:
        torch._foreach_mul_(list(tensors), list(factors))


def blend_each(tensors: Sequence[torch.Tensor], others: Sequence[torch.Tensor], share: float) -> None:
    """Move each tensor to its other by a share of the way, in place, in one call for all of them."""
    if tensors:
        torch._foreach_lerp_(list(tensors), list(others), share)
