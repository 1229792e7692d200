"""Other quantizers for ONNX Runtime's CPU: each makes a file of a float32 file and samples, or says why not.

ONNX Runtime's own comes with it; `pip install --no-deps --target DIR nncf amd-quark` and DIR in PYTHONPATH bring the
others, with what they say is missing (pydot, tabulate, openvino-telemetry; pandas, zstandard, onnxslim, ninja).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import (  # type: ignore[import-untyped]
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process  # type: ignore[import-untyped]

from graphopt.measure.processor import said_of_processor

Feed = Mapping[str, np.ndarray]

_PRODUCTS = ("MatMul", "Gemm")
_RECURRENT = ("LSTM",)
_MISSING = "not installed"
_OTHERS = ("Attention", "Gather", "EmbedLayerNormalization")  # of what quantize_dynamic knows


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Hands out calibration samples one by one."""

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self._feeds = feeds
        self.rewind()

    def rewind(self) -> None:
        self._left = iter(self._feeds)

    def get_next(self) -> Feed | None:
        return next(self._left, None)

    def __len__(self) -> int:
        return len(self._feeds)


def saturates() -> bool:
    """Whether products of 8-bit integers do on this processor: x86 without VNNI."""
    flags = set(" ".join(said_of_processor("flags")).split())
    return "avx2" in flags and flags.isdisjoint(("avx512_vnni", "avx_vnni"))


def prepare(source: Path) -> Path:
    """Write the file as ONNX Runtime's quantizer wants it: optimized, with shapes."""
    prepared = source.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    return prepared


def defaults(source: Path, target: Path, feeds: Sequence[Feed]) -> str:
    """Quantize with ONNX Runtime's `quantize_static` as it is."""
    quantize_static(str(source), str(target), _Reader(feeds))
    return ""


def static(source: Path, target: Path, feeds: Sequence[Feed]) -> str:
    """Quantize with its best settings for convolutions: uint8 activations, int8 weights per channel."""
    quantize_static(
        str(source), str(target), _Reader(feeds), quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8, per_channel=True, reduce_range=saturates(),
    )  # fmt: skip
    return ""


def dynamic(source: Path, target: Path, feeds: Sequence[Feed]) -> str:
    """Quantize with its best settings for transformers and LSTMs: `quantize_dynamic`, int8 weights per channel."""
    operators = {node.op_type for node in onnx.load(source, load_external_data=False).graph.node}
    wanted = [name for name in (*_PRODUCTS, *_RECURRENT) if name in operators]
    if not wanted or ("Conv" in operators and "MatMul" not in operators):
        return "has no products, or convolutions among them: dynamic scales are slower than float there"
    options: dict[str, Any] = {"weight_type": QuantType.QInt8, "per_channel": True, "reduce_range": saturates()}
    quantize_dynamic(str(source), str(target), [*wanted, *_OTHERS], **options)
    return ""


def nncf(source: Path, target: Path, feeds: Sequence[Feed]) -> str:
    """Quantize with NNCF's ONNX back end for CPUs."""
    if importlib.util.find_spec("nncf") is None:
        return _MISSING
    import nncf

    model = onnx.load(source)
    products = sum(node.op_type in _PRODUCTS for node in model.graph.node)
    convolutions = sum(node.op_type == "Conv" for node in model.graph.node)
    fix = nncf.OverflowFix.ENABLE if saturates() else nncf.OverflowFix.DISABLE
    made = nncf.quantize(
        model,
        nncf.Dataset(list(feeds)),
        subset_size=len(feeds),
        preset=nncf.QuantizationPreset.MIXED,
        target_device=nncf.TargetDevice.CPU,
        model_type=nncf.ModelType.TRANSFORMER if products > convolutions else None,
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=fix),
    )
    onnx.save(made, target)
    return ""


def quark(source: Path, target: Path, feeds: Sequence[Feed]) -> str:
    """Quantize with Quark's settings for CPUs, U8S8_AAWS, per channel."""
    if importlib.util.find_spec("quark") is None:
        return _MISSING
    from quark.onnx import ModelQuantizer
    from quark.onnx.quantization.config.config import Config
    from quark.onnx.quantization.config.custom_config import get_default_config

    settings = get_default_config("U8S8_AAWS")
    settings.per_channel, settings.reduce_range = True, saturates()
    ModelQuantizer(Config(global_quant_config=settings)).quantize_model(str(source), str(target), _Reader(feeds))
    return ""


PEERS: dict[str, Callable[[Path, Path, Sequence[Feed]], str]] = {
    "ORT defaults": defaults,
    "ORT static": static,
    "ORT dynamic": dynamic,
    "NNCF": nncf,
    "Quark": quark,
}
