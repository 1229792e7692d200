"""ONNX Runtime sessions from plain data: the one place that touches `onnxruntime.SessionOptions`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import onnxruntime  # type: ignore[import-untyped]

from graphopt.errors import LoweringError, UsageError
from graphopt.ir.plain_data import Json
from graphopt.targets.backend import Array

_LEVELS = {
    "disabled": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_ERRORS_ONLY = 3

# On x86 without VNNI, products of uint8 and int8 saturate in 16 bits (off by up to 90 of 255 steps on small models,
# AVX2, 1.31.1). Asked to be precise, the runtime turns the weights to uint8 there; elsewhere this changes nothing.
PRECISE = {"session.x64quantprecision": "1"}


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """Session options as plain data, under the names the manifest stores.

    Attributes:
        threads: threads an operator may use, 0 for the runtime's choice.
        optimization: "disabled", "basic", "extended" or "all".
        spinning: whether idle threads spin instead of sleeping.
        disabled_optimizers: graph optimizers to leave out, by the runtime's names.
        config: the runtime's own configuration entries.
    """

    threads: int = 0
    optimization: str = "all"
    spinning: bool = True
    disabled_optimizers: tuple[str, ...] = ()
    config: Mapping[str, str] | None = None

    @classmethod
    def of(cls, options: Mapping[str, Json]) -> SessionSettings:
        """Read recorded options.

        Raises:
            UsageError: an option is unknown or its value is of the wrong kind.
        """
        known = [item.name for item in fields(cls)]
        for name, value in options.items():
            if name not in known:
                raise UsageError(f"There is no session option `{name}`. Known: {', '.join(known)}.")
            _check(name, value)
        values = dict(options)
        if "disabled_optimizers" in values:
            values["disabled_optimizers"] = tuple(values["disabled_optimizers"])  # type: ignore[arg-type]
        return cls(**values)  # type: ignore[arg-type]

    def native(self) -> onnxruntime.SessionOptions:
        """Return them as the runtime takes them."""
        native = onnxruntime.SessionOptions()
        native.log_severity_level = _ERRORS_ONLY
        native.intra_op_num_threads = self.threads
        native.graph_optimization_level = _LEVELS[self.optimization]
        if not self.spinning:
            native.add_session_config_entry("session.intra_op.allow_spinning", "0")
        for key, value in (self.config or {}).items():
            native.add_session_config_entry(key, value)
        return native


class OnnxSession:
    """A loaded ONNX file: called with one array per input, returns one array per output, in order."""

    def __init__(
        self,
        model: Path | bytes,
        settings: SessionSettings,
        *,
        folder: Path | None = None,
        optimized: Path | None = None,
    ) -> None:
        """Load `model` on the CPU.

        Args:
            model: the file, or a serialized model.
            settings: session options.
            folder: where the external data of a serialized model lies.
            optimized: where to write the graph that the runtime's optimizer makes of it.

        Raises:
            LoweringError: the runtime cannot read the model or has no kernel for an operator.
        """
        native = settings.native()
        if folder is not None:
            native.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        if optimized is not None:
            native.optimized_model_filepath = str(optimized)
        try:
            self._session = onnxruntime.InferenceSession(
                str(model) if isinstance(model, Path) else model,
                native,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=list(settings.disabled_optimizers),
            )
        except Exception as err:  # onnxruntime's exceptions have no common base
            name = model.name if isinstance(model, Path) else "the model"
            raise LoweringError(f"ONNX Runtime refuses {name}: {_reason(err)}") from err
        self.inputs = tuple(value.name for value in self._session.get_inputs())
        self.outputs = tuple(value.name for value in self._session.get_outputs())

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        """Run once.

        Raises:
            LoweringError: an input does not fit, or a kernel fails.
        """
        if len(inputs) != len(self.inputs):
            raise LoweringError(
                f"The artifact takes {len(self.inputs)} inputs ({', '.join(self.inputs)}), {len(inputs)} were given."
            )
        return tuple(self._run(None, inputs))

    def named(self, outputs: Sequence[str], inputs: Sequence[Array]) -> dict[str, Array]:
        """Run once and return some outputs by name."""
        return dict(zip(outputs, self._run(list(outputs), inputs), strict=True))

    def _run(self, outputs: list[str] | None, inputs: Sequence[Array]) -> list[Array]:
        feed = {name: np.asarray(array, order="C") for name, array in zip(self.inputs, inputs, strict=True)}
        try:
            return list(self._session.run(outputs, feed))
        except Exception as err:  # onnxruntime's exceptions have no common base
            shapes = ", ".join(f"{name}: {'x'.join(map(str, array.shape))}" for name, array in feed.items())
            raise LoweringError(f"ONNX Runtime fails on inputs {shapes}: {_reason(err)}") from err


def _check(name: str, value: Json) -> None:
    fits = {
        "threads": isinstance(value, int) and not isinstance(value, bool) and value >= 0,
        "optimization": value in _LEVELS if isinstance(value, str) else False,
        "spinning": isinstance(value, bool),
        "disabled_optimizers": isinstance(value, list | tuple),
        "config": value is None or isinstance(value, Mapping),
    }
    if not fits[name]:
        raise UsageError(f"Session option `{name}` cannot be {value!r}.")


def _reason(err: Exception) -> str:
    text = next((line.strip() for line in str(err).splitlines() if line.strip()), type(err).__name__)
    return text.split(" : ", 3)[-1] if text.startswith("[ONNXRuntimeError]") else text
