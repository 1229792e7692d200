"""Operators that ONNX Runtime adds to ONNX, as the exporter may write them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx.defs import OpSchema
from onnxscript import evaluator, opset20

CONTRIB = "com.microsoft"

op: Any = opset20
_OPTIONAL = OpSchema.FormalParameterOption.Optional
_REAL, _INTEGERS, _STEPS = "tensor(float)", "tensor(int8)", "tensor(int32)"
_LSTM_INPUTS = {
    "X": _REAL,
    "W": _INTEGERS,
    "R": _INTEGERS,
    "B": _REAL,
    "sequence_lens": _STEPS,
    "initial_h": _REAL,
    "initial_c": _REAL,
    "P": _REAL,
    "W_scale": _REAL,
    "W_zero_point": _INTEGERS,
    "R_scale": _REAL,
    "R_zero_point": _INTEGERS,
}
_LSTM = OpSchema(
    "DynamicQuantizeLSTM",
    CONTRIB,
    1,
    inputs=[OpSchema.FormalParameter(name, kind, param_option=_OPTIONAL) for name, kind in _LSTM_INPUTS.items()],
    outputs=[OpSchema.FormalParameter(name, _REAL) for name in ("Y", "Y_h", "Y_c")],
    attributes=[
        OpSchema.Attribute("hidden_size", OpSchema.AttrType.INT, "", required=True),
        OpSchema.Attribute("direction", OpSchema.AttrType.STRING, "", required=True),
    ],
)


def dynamic_lstm(
    x: Any, h: Any, c: Any, weight: Any, scale: Any, recurrent: Any, recurrent_scale: Any, bias: Any
) -> Any:
    """Write a call of `graphopt::dynamic_lstm`."""
    directions, _, gates = weight.shape
    zeros = [op.Constant(value=ir.tensor(np.zeros((directions, gates), np.int8))) for _ in range(2)]
    recorder: Any = evaluator.default()  # the exporter's, while it translates
    return recorder.eval(
        _LSTM,
        (x, weight, recurrent, bias, None, h, c, None, scale, zeros[0], recurrent_scale, zeros[1]),
        {"hidden_size": gates // 4, "direction": "bidirectional" if directions == 2 else "forward"},
    )
