"""Lowering to ONNX Runtime on the CPU."""

from __future__ import annotations

from graphopt.backends.onnxruntime.backend import OnnxRuntimeBackend

__all__ = ["OnnxRuntimeBackend"]
