"""Whether products of integers saturate on this processor: asked of the runtime itself, on any system.

x86 without VNNI adds up pairs of products of uint8 and int8 in 16 bits, where two of 255 and 127 do not fit. The
runtime can be asked to turn weights to uint8 there; with VNNI that would take three times as long, for nothing
(ResNet-18, AVX512-VNNI, 1.31.1).
"""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir
import onnxruntime  # type: ignore[import-untyped]

SIZE = 32  # of the matrices: enough of them for the kernel that large ones take
ACTIVATION, WEIGHT = 255, 127  # the largest of their types
EXACT = SIZE * ACTIVATION * WEIGHT


@functools.cache
def probe() -> bytes:
    """Return a model of one product of matrices of SIZE by SIZE, `a` (uint8) and `b` (int8)."""
    types = {"a": ir.DataType.UINT8, "b": ir.DataType.INT8, "product": ir.DataType.INT32}
    a, b, product = (
        ir.Value(name=name, shape=ir.Shape((SIZE, SIZE)), type=ir.TensorType(dtype)) for name, dtype in types.items()
    )
    node = ir.Node("", "MatMulInteger", [a, b], outputs=[product])
    graph = ir.Graph([a, b], [product], nodes=[node], opset_imports={"": 20}, name="probe")
    serialized: bytes = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return serialized


@functools.cache
def products_saturate() -> bool:
    """Return whether the runtime's products of integers are wrong here, unless it is asked to be precise."""
    session = onnxruntime.InferenceSession(probe(), providers=["CPUExecutionProvider"])
    feed = {
        "a": np.full((SIZE, SIZE), ACTIVATION, dtype=np.uint8),
        "b": np.full((SIZE, SIZE), WEIGHT, dtype=np.int8),
    }
    return bool((session.run(None, feed)[0] != EXACT).any())
