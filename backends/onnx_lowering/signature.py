"""Give an exported model the program's own names and axes: `batch`, not `s77`.

Also makes names deterministic: a node is called after the module and operator it comes from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import onnx_ir as ir
import torch
from onnx_ir.passes.common import OutputFixPass
from onnx_ir.tensor_adapters import from_torch_dtype

from graphopt.backends.onnx_lowering.exporter import MODULE_PROPERTY
from graphopt.backends.onnx_lowering.ranges import recorded_ranges
from graphopt.backends.onnx_lowering.values import values_of
from graphopt.errors import LoweringError
from graphopt.ir.names import Names
from graphopt.ir.signature import Dimension, TensorSpec

_NUMPY_HOLDS = frozenset(
    {
        *(torch.float16, torch.float32, torch.float64, torch.bool),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    }
)


def apply_signature(model: ir.Model, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
    """Rename inputs, outputs and dynamic axes to those of the program, in place.

    Raises:
        LoweringError: an input or output is of a kind that ONNX or numpy has no equal of (complex numbers, bfloat16).
    """
    check_kinds((*inputs, *outputs))
    OutputFixPass()(model)
    graph = model.graph
    if len(graph.inputs) != len(inputs) or len(graph.outputs) != len(outputs):
        raise LoweringError(
            f"The exported graph has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs where the program has "
            f"{len(inputs)} and {len(outputs)}. Please report the model."
        )
    model.metadata_props.update(recorded_ranges(inputs))
    names = _axis_names(graph.inputs, inputs)
    for value in values_of(model):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(size, names) for size in value.shape.dims])
    _rename_values(model, [*zip(graph.inputs, inputs, strict=True), *zip(graph.outputs, outputs, strict=True)])
    _rename_nodes(graph)


def check_kinds(specs: Iterable[TensorSpec]) -> None:
    """Refuse inputs and outputs that ONNX or numpy has no equal of.

    Raises:
        LoweringError: one is complex, or bfloat16.
    """
    for spec in specs:
        if spec.dtype.is_complex:
            raise LoweringError(
                f"`{spec.name}` is complex, and ONNX models have no complex inputs or outputs. Let the model take "
                "or return torch.view_as_real of it."
            )
        if spec.dtype not in _NUMPY_HOLDS:
            raise LoweringError(
                f"`{spec.name}` is {str(spec.dtype).removeprefix('torch.')}, which numpy arrays cannot hold. Convert "
                "the model with `model.float()`; where the runtime computes in that type, which ONNX Runtime does not, "
                "it is enough that the model takes and returns float32 and converts inside."
            )


def _axis_names(values: Iterable[ir.Value], specs: Iterable[TensorSpec]) -> dict[str, str]:
    """Map the exporter's symbols to the program's axis names."""
    names: dict[str, str] = {}
    for value, spec in zip(values, specs, strict=True):
        assert value.shape is not None  # the exporter knows the shape of every input
        for size, wanted in zip(value.shape.dims, spec.shape, strict=True):
            if isinstance(size, ir.SymbolicDim) and isinstance(wanted, str) and size.value is not None:
                symbol = str(size.value)
                if symbol.isidentifier():
                    names.setdefault(symbol, wanted)
    return names


def _renamed(size: int | ir.SymbolicDim, names: dict[str, str]) -> int | ir.SymbolicDim:
    if isinstance(size, int) or size.value is None:
        return size
    text = re.sub(r"[A-Za-z_]\w*", lambda match: names.get(match[0], match[0]), str(size.value))
    return ir.SymbolicDim(text.replace(" ", ""))


def _rename_values(model: ir.Model, wanted: list[tuple[ir.Value, TensorSpec]]) -> None:
    """Give inputs and outputs their names; whoever has one of those names already gives it up."""
    reserved = {spec.name for _, spec in wanted}
    fixed = {id(value) for value, _ in wanted}
    others = list(values_of(model))
    names = Names(reserved | {value.name for value in others if value.name})
    for value, _ in wanted:  # free every name first: an output may bear the name an input is to have
        value.name = names.new(f"{value.name}_")
    for value in others:
        if id(value) not in fixed and value.name in reserved:
            value.name = names.new(value.name)
    for value, spec in wanted:
        value.name = spec.name
        value.shape = ir.Shape(list(map(_known, spec.shape, value.shape or spec.shape)))
        value.dtype = from_torch_dtype(spec.dtype)


def _known(size: Dimension, found: int | str | ir.SymbolicDim) -> Dimension | None:
    """Return a size of the signature, None for what is computed and not known to be that at every size."""
    unknown = isinstance(found, ir.SymbolicDim) and found.value is None
    return None if unknown and isinstance(size, str) and not size.isidentifier() else size


def _rename_nodes(graph: ir.Graph) -> None:
    """Call nodes after the module they come from: `layer1.0.conv1/Conv`."""
    names = Names()
    for node in graph.all_nodes():
        module = node.metadata_props.pop(MODULE_PROPERTY, "")  # said twice it is 25 KB of a sentence encoder
        node.name = names.new(f"{module}/{node.op_type}" if module else node.op_type)
