"""Lowering to an ONNX file that TensorRT compiles to integer kernels."""

from __future__ import annotations

from graphopt.backends.tensorrt.backend import TensorRTBackend

__all__ = ["TensorRTBackend"]
