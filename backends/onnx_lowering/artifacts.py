"""Reading an artifact's signature back from its file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
from onnx_ir.tensor_adapters import to_torch_dtype

from graphopt.backends.onnx_lowering.ranges import ranges_of
from graphopt.errors import LoweringError
from graphopt.ir.signature import TensorSpec


def read_model(path: Path) -> ir.Model:
    """Read an ONNX file; large tensors stay on disk.

    Raises:
        LoweringError: the file is missing, damaged or something else.
    """
    if not path.is_file():
        raise LoweringError(f"There is no file {path}. Give the .onnx file that `graphopt optimize` wrote.")
    try:
        return ir.load(path)
    except Exception as err:  # protobuf and onnx_ir raise unrelated classes on damaged files
        raise LoweringError(f"{path} is no ONNX model, or damaged: {type(err).__name__}: {err}.") from err


def files_of(path: Path, model: ir.Model) -> tuple[Path, ...]:
    """List the files of an artifact, `path` first.

    Raises:
        LoweringError: it reads weights from what is no file of its own directory.
    """
    tensors = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    names = dict.fromkeys(str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor))
    for name in names:
        file = path.parent / name
        if Path(name).name != name or file.is_symlink() or not file.is_file():
            raise LoweringError(
                f"{path} keeps weights in {name!r}, which is no file beside it. Give an artifact whole."
            )
    return path, *(path.parent / name for name in names)


def specs(values: list[ir.Value], path: Path, properties: Mapping[str, str]) -> tuple[TensorSpec, ...]:
    """Describe the inputs or outputs of a model, of which the file has these properties.

    Raises:
        LoweringError: one has no shape or is no tensor, or its sizes are not those of its axes.
    """
    found, ranges = [], ranges_of(properties)
    for value in values:
        if value.name is None or value.shape is None or value.dtype is None:
            raise LoweringError(
                f"`{value.name}` of {path.name} has no shape. Only models with known ranks can be opened."
            )
        shape = tuple(
            size if isinstance(size, int) else str(size.value or f"{value.name}_{axis}")
            for axis, size in enumerate(value.shape.dims)
        )
        bound = ranges.get(value.name, ())
        if len(bound) not in (0, len(shape)):
            raise LoweringError(
                f"`{value.name}` of {path.name} has {len(bound)} ranges of sizes for {len(shape)} axes. Write it again."
            )
        found.append(TensorSpec(value.name, shape, to_torch_dtype(value.dtype), bound))
    return tuple(found)
