"""ONNX Runtime sessions from plain data: the one place that touches `onnxruntime.SessionOptions`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
import pydantic

from graphopt.backends.onnx_execution.saturating_products import products_saturate
from graphopt.backends.onnx_lowering.ranges import ranges_of
from graphopt.errors import LoweringError, UsageError, cut, first_problem, printable
from graphopt.ir.memory import trim
from graphopt.ir.plain_data import Json
from graphopt.ir.signature import size_out_of_range
from graphopt.targets.backend import Array
from graphopt.versions import check_version

check_version("onnxruntime", onnxruntime.__version__)

_LEVELS = {
    "disabled": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_ERRORS_ONLY, _NOTHING = 3, 4

# Where products of uint8 and int8 saturate (off by up to 90 of 255 steps on small models, AVX2, 1.31.1), the runtime
# turns the weights to uint8 when it is asked to be precise. Elsewhere that costs time for nothing.
PRECISE = {"session.x64quantprecision": "1"}

# On ARM with SME, a product behind a DynamicQuantizeLinear gets a kernel that rounds by scales of its own: what it
# computes is not what the file says, nor can it be verified (1.31.1, emulated). Elsewhere this changes nothing.
ROUNDED_AS_WRITTEN = {"mlas.disable_kleidiai": "1"}

# Options may come from a file. The runtime takes more entries: some name files that it reads or writes.
_MOST_THREADS = 1024
_Entry = Literal[
    "mlas.disable_kleidiai",
    "mlas.enable_gemm_fastmath_arm64_bfloat16",
    "session.disable_prepacking",
    "session.disable_quant_qdq",
    "session.dynamic_block_base",
    "session.enable_quant_qdq_cleanup",
    "session.force_spinning_stop",
    "session.inter_op.allow_spinning",
    "session.intra_op.allow_spinning",
    "session.qdqisint8allowed",
    "session.set_denormal_as_zero",
    "session.x64quantprecision",
]
_Word = Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9_]{1,64}$")]


class _Recorded(pydantic.BaseModel, extra="forbid", strict=True, frozen=True):
    """The options as a file may have them; `SessionSettings` takes entries of ours too, which name files."""

    threads: Annotated[int, pydantic.Field(ge=0, le=_MOST_THREADS)] = 0
    optimization: Literal["disabled", "basic", "extended", "all"] = "all"
    spinning: bool = True
    disabled_optimizers: tuple[_Word, ...] = ()
    config: dict[_Entry, _Word] | None = None
    where_products_saturate: dict[_Entry, _Word] | None = None


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """Session options as plain data, under the names the manifest stores.

    Attributes:
        threads: threads an operator may use, 0 for the runtime's choice.
        optimization: "disabled", "basic", "extended" or "all".
        spinning: whether idle threads spin instead of sleeping.
        disabled_optimizers: graph optimizers to leave out, by the runtime's names.
        config: the runtime's own configuration entries.
        where_products_saturate: more of them for processors whose products of integers do (x86 without VNNI).
    """

    threads: int = 0
    optimization: str = "all"
    spinning: bool = True
    disabled_optimizers: tuple[str, ...] = ()
    config: Mapping[str, str] | None = None
    where_products_saturate: Mapping[str, str] | None = None

    @classmethod
    def of(cls, options: Mapping[str, Json]) -> SessionSettings:
        """Read recorded options.

        Raises:
            UsageError: an option is unknown, or its value is of the wrong kind or out of bounds.
        """
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
        try:
            return cls(**_Recorded.model_validate(values).model_dump())
        except pydantic.ValidationError as err:
            unknown = [name for name in options if name not in _Recorded.model_fields]
            if unknown:
                known = ", ".join(_Recorded.model_fields)
                shown = cut(printable(unknown[0]), 80)
                raise UsageError(f"There is no session option `{shown}`. Known: {known}.") from err
            problem = first_problem(err)
            name = problem.path[0]
            raise UsageError(
                f"Session option `{name}` cannot be {cut(repr(options[name]), 80)}: {problem.said}."
            ) from err

    def native(self) -> onnxruntime.SessionOptions:
        """Return them as the runtime takes them."""
        native = onnxruntime.SessionOptions()
        native.log_severity_level = _ERRORS_ONLY
        native.intra_op_num_threads = self.threads
        native.graph_optimization_level = _LEVELS[self.optimization]
        if not self.spinning:
            native.add_session_config_entry("session.intra_op.allow_spinning", "0")
        config = dict(self.config or {})
        if self.where_products_saturate and products_saturate():
            config.update(self.where_products_saturate)
        for key, value in config.items():
            native.add_session_config_entry(key, value)
        return native


class OnnxSession:
    """A loaded ONNX file: called with one array per input, in order or by name, returns one per output, in order."""

    def __init__(
        self,
        model: Path | bytes,
        settings: SessionSettings,
        *,
        folder: Path | None = None,
        optimized: Path | None = None,
        profile: Path | None = None,
    ) -> None:
        """Load `model` on the CPU.

        Args:
            model: the file, or a serialized model.
            settings: session options.
            folder: where the external data of a serialized model lies.
            optimized: where to write the graph that the runtime's optimizer makes of it.
            profile: how the name of the file begins that `end_profiling` returns.

        Raises:
            LoweringError: the runtime cannot read the model or has no kernel for an operator.
        """
        native = settings.native()
        if folder is not None:
            native.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        if optimized is not None:
            native.optimized_model_filepath = str(optimized)
        if profile is not None:
            native.enable_profiling, native.profile_file_prefix = True, str(profile)
        trim(_bytes_of(model) // 4)  # what a session before took, and below what loading took
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
        trim(_bytes_of(model) // 4)
        self._silent = onnxruntime.RunOptions()
        self._silent.log_severity_level = _NOTHING  # what is wrong is raised
        self.inputs = tuple(value.name for value in self._session.get_inputs())
        self._ranges = ranges_of(self._session.get_modelmeta().custom_metadata_map)
        self.outputs = tuple(value.name for value in self._session.get_outputs())

    def __call__(self, /, *inputs: Array, **named: Array) -> tuple[Array, ...]:
        """Run once.

        Raises:
            LoweringError: an input does not fit, or a kernel fails.
            UsageError: an axis has a size that the program was declared not to have.
        """
        names = self.inputs[len(inputs) :]
        if len(inputs) > len(self.inputs) or named.keys() != {*names}:
            given = f"{len(inputs)} in order" + (f" and {', '.join(named)} by name" if named else "")
            raise LoweringError(
                f"The artifact takes {len(self.inputs)} inputs ({', '.join(self.inputs)}), given were {given}."
            )
        return tuple(self._run(None, (*inputs, *(named[name] for name in names))))

    def named(self, outputs: Sequence[str], inputs: Sequence[Array]) -> dict[str, Array]:
        """Run once and return some outputs by name."""
        return dict(zip(outputs, self._run(list(outputs), inputs), strict=True))

    def end_profiling(self) -> Path:
        """Return the file that says what every operator took in every run so far."""
        return Path(self._session.end_profiling())

    def _run(self, outputs: list[str] | None, inputs: Sequence[Array]) -> list[Array]:
        feed = {name: np.asarray(array, order="C") for name, array in zip(self.inputs, inputs, strict=True)}
        for name, array in feed.items():
            if wrong := size_out_of_range(name, self._ranges.get(name, ()), array.shape):
                raise UsageError(f"{wrong} Give no others, or capture the model for them.")
        try:
            return list(self._session.run(outputs, feed, self._silent))
        except Exception as err:  # onnxruntime's exceptions have no common base
            shapes = ", ".join(f"{name}: {'x'.join(map(str, array.shape))}" for name, array in feed.items())
            raise LoweringError(f"ONNX Runtime fails on inputs {shapes}: {_reason(err)}") from err


def _bytes_of(model: Path | bytes) -> int:
    if isinstance(model, bytes):
        return len(model)
    return sum(file.stat().st_size for file in (model, model.with_name(f"{model.name}.data")) if file.is_file())


def _reason(err: Exception) -> str:
    said = " ".join(str(err).split()).removesuffix(" Please fix either the inputs/outputs or the model.")
    said = cut(said.rstrip("."))
    return said.split(" : ", 3)[-1] if said.startswith("[ONNXRuntimeError]") else said
