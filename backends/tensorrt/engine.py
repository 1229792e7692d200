"""The one adapter to `tensorrt_rtx`: parse an artifact and build its engine, on a machine without a GPU.

Only documented interfaces are used: parser errors, the result of the build, and the builder's log. The engine itself
is thrown away unread: the licence forbids taking it apart, and only a GPU could run it.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.errors import LoweringError

Shapes = tuple[tuple[int, ...], ...]  # one shape per input

_MODULE = "tensorrt_rtx"
_COMPUTE_CAPABILITY = "SM86"
_WEIGHTS = re.compile(r"Total Weights Memory: (?P<bytes>\d+) bytes")


@dataclass(frozen=True, slots=True)
class Engine:
    """What building an engine told.

    Attributes:
        version: of tensorrt-rtx.
        compute_capability: what it was built for.
        weights_memory: bytes of weights, as the builder reports them; None if it does not.
        sparse: whether the builder was allowed to use kernels for sparse weights.
    """

    version: str
    compute_capability: str
    weights_memory: int | None
    sparse: bool


def available() -> bool:
    """Whether the extra `graphopt[tensorrt]` is installed."""
    return importlib.util.find_spec(_MODULE) is not None


def build(path: Path, shapes: Sequence[Shapes], *, sparse: bool = False) -> Engine:
    """Parse the artifact at `path` and build its engine for compute capability 8.6.

    Args:
        path: the `.onnx` file.
        shapes: input shapes at the smallest, the usual and the largest batch size; one for a static model.
        sparse: whether the builder may look for sparse weights and use the kernels for them.

    Raises:
        LoweringError: TensorRT refuses the artifact; the message names the node.
    """
    trt = importlib.import_module(_MODULE)
    log = _logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        raise LoweringError(f"TensorRT refuses {path.name}: {_parser_errors(parser)}")
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, _COMPUTE_CAPABILITY), 0)
    if sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    _set_shapes(builder, config, network, shapes)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise LoweringError(f"TensorRT parses {path.name} but cannot build its engine: {log.last_error()}")
    return Engine(
        str(trt.__version__),
        _COMPUTE_CAPABILITY,
        log.weights_memory(),
        bool(config.get_flag(trt.BuilderFlag.SPARSE_WEIGHTS)),
    )


def _set_shapes(builder: Any, config: Any, network: Any, shapes: Sequence[Shapes]) -> None:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    if not any(-1 in tuple(value.shape) for value in inputs):
        return
    smallest, usual, largest = (shapes[0], shapes[len(shapes) // 2], shapes[-1])
    profile = builder.create_optimization_profile()
    for index, value in enumerate(inputs):
        profile.set_shape(value.name, smallest[index], usual[index], largest[index])
    config.add_optimization_profile(profile)


def _parser_errors(parser: Any) -> str:
    errors = (parser.get_error(index) for index in range(parser.num_errors))
    lines = [
        f"{error.node_name() or 'the model'} ({error.node_operator()}): {error.desc().strip()}" for error in errors
    ]
    return "; ".join(dict.fromkeys(lines)) or "it gives no reason."


def _logger(trt: Any) -> Any:
    """Return a logger that keeps what the builder says; its base class exists only once the module is imported."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._lines: list[tuple[Any, str]] = []

        def log(self, severity: Any, message: str) -> None:
            self._lines.append((severity, message))

        def last_error(self) -> str:
            errors = [text for severity, text in self._lines if severity == trt.ILogger.ERROR]
            return errors[-1].strip() if errors else "it gives no reason."

        def weights_memory(self) -> int | None:
            found = [match for _, text in self._lines if (match := _WEIGHTS.search(text))]
            return int(found[-1]["bytes"]) if found else None

    return Log()
