"""The one adapter to `torch.onnx`: translate a program, and say in the user's terms what cannot be lowered.

`torch.onnx.export` reports the operator it stumbled over only in the frames of its traceback and in its message;
both are read here and nowhere else (checked on torch 2.13).
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping

import onnx_ir as ir
import torch
from torch import fx

from graphopt.backends.onnx_lowering.any_size import hold_at_any_size
from graphopt.backends.onnx_lowering.decomposition import Decomposed, has_decided
from graphopt.backends.onnx_lowering.fixed_bags import reduce_fixed_bags
from graphopt.backends.onnx_lowering.restated import restate
from graphopt.backends.onnx_lowering.stored_bytes import keep_bytes
from graphopt.backends.onnx_lowering.tensor_results import only_tensors
from graphopt.backends.onnx_lowering.translations import table
from graphopt.backends.onnx_lowering.values import values_of
from graphopt.capturing.guards import take_out_guards
from graphopt.errors import LoweringError, foreign_code
from graphopt.ir.exporting import exported
from graphopt.ir.program import Program
from graphopt.ir.provenance import line_in, module_path, user_line
from graphopt.ir.regions import graph_modules
from graphopt.ir.torch_internals import onnx_exporter
from graphopt.quantization.ops import DYNAMIC_QUANTIZE, QUANTIZE
from graphopt.quantization.recurrent import DYNAMIC_LSTM

logger = logging.getLogger(__name__)

SOURCE_PROPERTY = "graphopt.source"  # key of an ONNX node's metadata: the program's name of a quantization
MODULE_PROPERTY = "graphopt.module"  # the module whose forward ran it, until nodes are named after it

QUANTIZERS = ("QuantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeLSTM")
_QUANTIZES = re.compile(r"graphopt\.(quantize|dynamic_quantize|dynamic_lstm)\.")
_CALL = "pkg.torch.onnx.fx_node"  # where the exporter writes the call an ONNX node translates
_TRACE = "pkg.torch.onnx.stack_trace"
_UNTRANSLATED = re.compile(
    r"No ONNX function found for <OpOverload\(op='(?P<op>[^']+)', overload='(?P<overload>[^']+)'"
)


def export(program: Program, opset: int) -> ir.Model:
    """Translate a program; arguments and results that are no tensors are left out.

    Every ONNX node carries the module path it comes from as metadata, and every quantization its program node.

    Raises:
        LoweringError: an operator has no ONNX form.
    """
    found = exported(only_tensors(program))
    graph = found.program.graph
    own = Decomposed.on_demand(found.program)
    _forget_strides(own.graph_module)
    take_out_guards(own.graph_module)
    reduce_fixed_bags(own.graph_module)
    hold_at_any_size(own.graph_module)
    restate(own.graph_module)
    keep_bytes(own)
    for body in graph_modules(own.graph_module):
        body.recompile()
    with (
        onnx_exporter(),
        warnings.catch_warnings(),
        _quiet("torch.onnx"),
        _quiet("onnxscript"),
        _quiet("onnx_ir"),
    ):
        warnings.simplefilter("ignore")
        with foreign_code(lambda _, err: _refusal(err, graph)):
            onnx_program = torch.onnx.export(
                own, dynamo=True, opset_version=opset, custom_translation_table=table(), verbose=False
            )
    assert onnx_program is not None  # only the TorchScript exporter writes a file instead
    model: ir.Model = onnx_program.model
    if has_decided(own.graph_module):
        _forget_sizes(model)
    _name_sources(model, graph, found.sources)
    return model


def _forget_strides(gm: fx.GraphModule) -> None:
    """Put a copy between a view and the transpose it is of: an Identity to ONNX, which knows no strides.

    The exporter runs the graph again with attention whose result has other strides than when the view was traced, and
    then fails on the view (torch 2.13; T5, whose `contiguous` was traced away as idle).
    """
    aten = torch.ops.aten
    for node in list(gm.graph.nodes):
        if node.target not in (aten.view.default, aten.reshape.default):
            continue
        source = node.args[0]
        if source.target not in (aten.transpose.int, aten.permute.default):
            continue
        with gm.graph.inserting_before(node):
            copy = gm.graph.call_function(aten.clone.default, (source,), {"memory_format": torch.contiguous_format})
        copy.meta.update({key: value for key, value in source.meta.items() if key != "custom"})
        copy.meta["val"] = source.meta["val"].contiguous()
        node.replace_input_with(source, copy)


def _forget_sizes(model: ir.Model) -> None:
    """Drop the names of sizes that are computed, of which some hold at the sizes of the example alone.

    ONNX Runtime puts two values of sizes of one name into the same memory, and fails where they differ.
    """
    for value in values_of(model):
        if value.shape is not None and not value.is_graph_input():
            sizes = [size if isinstance(size, int) else None for size in value.shape.dims]
            value.shape = ir.Shape(sizes)


class _quiet:  # noqa: N801  (a context manager, used like a function)
    """Silence a library's progress and advice; errors arrive as exceptions."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def __enter__(self) -> None:
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *exception: object) -> None:
        self._logger.setLevel(self._level)


def _name_sources(model: ir.Model, graph: fx.Graph, sources: Mapping[str, str]) -> None:
    """Replace the exporter's metadata (source paths, stack traces) by where each node comes from."""
    calls = {node.name: node for node in graph.nodes if node.op == "call_function"}
    quantizers = _quantizers(model, graph)
    for node in model.graph.all_nodes():
        name = _exported_name(node)
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        node.metadata_props.clear()
        origin = quantizers.get(name, calls.get(name))
        if name in quantizers:
            node.metadata_props[SOURCE_PROPERTY] = sources[quantizers[name].name]
        path = module_path(origin) if origin is not None else _innermost(scopes)
        if path:
            node.metadata_props[MODULE_PROPERTY] = path


def _quantizers(model: ir.Model, graph: fx.Graph) -> dict[str, fx.Node]:
    """Map the exporter's names of quantizations to the exported calls.

    The exporter renames calls when it decomposes; it neither adds, drops nor reorders quantizations.
    """
    calls = [node for node in graph.nodes if node.target in (QUANTIZE, DYNAMIC_QUANTIZE, DYNAMIC_LSTM)]
    described = (node for node in model.graph.all_nodes() if node.op_type in QUANTIZERS)
    names = [_exported_name(node) for node in described if _QUANTIZES.search(node.metadata_props.get(_CALL, ""))]
    if len(names) != len(calls):  # some range has no QuantizeLinear: names are all there is
        by_name = {node.name: node for node in calls}
        return {name: by_name[name] for name in names if name in by_name}
    return dict(zip(names, calls, strict=True))


def _exported_name(node: ir.Node) -> str:
    return node.metadata_props.get(_CALL, "").removeprefix("%").split(" ", 1)[0]


def _innermost(scopes: str) -> str:
    """Return the module path among the exporter's scopes, written as a list whose last item is the operator."""
    names = re.findall(r"'([^']*)'", scopes)
    return names[-2] if len(names) >= 2 else ""


def _refusal(err: BaseException, graph: fx.Graph) -> LoweringError:
    """Return our own error that the exporter has wrapped, else one that says what it stumbled over."""
    known: BaseException | None = err
    while known is not None and not isinstance(known, LoweringError):
        known = known.__cause__
    return known or LoweringError(_explain(err, graph))


def _explain(err: BaseException, graph: fx.Graph) -> str:
    missing = _UNTRANSLATED.search(_chain(err))
    node, where = _failing_node(err), failing_line(err, graph)
    if missing:
        name = missing["op"] if missing["overload"] == "default" else f"{missing['op']}.{missing['overload']}"
        return (
            f"The operator {name}{where} has no ONNX form. Write that line with other operators, or compute it outside "
            "of the model."
        )
    shown = f" of {node.format_node()}" if isinstance(node, fx.Node) else ""
    return (
        f"torch.onnx cannot translate the program{where}{shown}: {_root(err)}. Write that line with other operators, "
        "or try a newer torch."
    )


def failing_line(err: BaseException, graph: fx.Graph) -> str:
    """Return " at file:line" of the user's model, where an exception came up while a call of it was looked at."""
    node = _failing_node(err)
    if isinstance(node, ir.Node):
        line = line_in(node.metadata_props.get(_TRACE, ""))
    else:
        line = (user_line(node) if node is not None else "") or _line_of(node, graph)
    return f" at {line}" if line else ""


def _chain(err: BaseException) -> str:
    texts, current = [], err
    while current is not None:
        texts.append(str(current))
        current = current.__cause__ or current.__context__  # type: ignore[assignment]
    return "\n".join(texts)


def _root(err: BaseException) -> str:
    while err.__cause__ is not None:
        err = err.__cause__
    return next((line.strip() for line in str(err).splitlines() if line.strip()), type(err).__name__).rstrip(".")


def _failing_node(err: BaseException | None) -> fx.Node | ir.Node | None:
    """Return the node that was being translated, or rewritten: the local variable of the exporter's loops."""
    while err is not None:
        trace = err.__traceback__
        while trace is not None:
            found = trace.tb_frame.f_locals.get("node")
            if isinstance(found, fx.Node | ir.Node):
                return found
            trace = trace.tb_next
        err = err.__cause__
    return None


def _line_of(node: fx.Node | None, graph: fx.Graph) -> str:
    """Return the user's line of a decomposed operator: that of the exported call that has its name."""
    if node is None:
        return ""
    same = next((candidate for candidate in graph.nodes if candidate.name == node.name), None)
    return user_line(same) if same is not None else ""
