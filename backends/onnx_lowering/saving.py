"""Write a model to disk: whole or not at all, the same bytes every time, large weights beside it."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from graphopt.files import replacing_directory

# Whoever writes or reads a protobuf message holds it whole, and copies of it; weights beside it are mapped.
EXTERNAL_DATA_ABOVE = 2**28
# A message ends at 2**31 - 1 bytes; what is not weights (nodes, names, shapes) gets 64 MiB of that.
MOST_IN_A_MESSAGE = 2**31 - 2**26
_SMALLEST_EXTERNAL = 1024  # bytes; runtimes read shapes and scales while they load the graph


def save(model: ir.Model, path: Path, *, external_data_above: int = EXTERNAL_DATA_ABOVE) -> tuple[Path, ...]:
    """Write `model` to `path`; return the files written, `path` first.

    Args:
        model: stays as it is.
        path: an `.onnx` file. External data goes to `NAME.onnx.data` beside it.
        external_data_above: bytes of weights from which on they are stored beside the model.

    Raises:
        UsageError: the place cannot be written to, or the disk is full.
    """
    beside = path.with_name(f"{path.name}.data")
    external = bytes_of_weights(model) > external_data_above
    with replacing_directory(path.parent) as temporary:
        ir.save(
            model,
            temporary / path.name,
            external_data=beside.name if external else None,
            size_threshold_bytes=_SMALLEST_EXTERNAL,
        )
    if external:
        return path, beside
    beside.unlink(missing_ok=True)  # left by a larger model of the same name
    return (path,)


def bytes_of_weights(model: ir.Model) -> int:
    """Return the bytes of all stored tensors."""
    tensors = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
