"""Lowering to ONNX Runtime on the CPU."""

from __future__ import annotations

from graphopt.backends.onnxruntime.backend import (
    OnnxRuntimeArmBackend,
    OnnxRuntimeAvx2Backend,
    OnnxRuntimeBackend,
)

__all__ = ["OnnxRuntimeArmBackend", "OnnxRuntimeAvx2Backend", "OnnxRuntimeBackend"]
