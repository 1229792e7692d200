"""Packed integers and scales of blocks as ONNX operators of graphopt's own, which no file holds.

    Unpack(packed: uint8) {size, bits, low}                       graphopt::unpack
    DequantizeBlocks(integers, scale, zero_point) {axis, block}   graphopt::dequantize with blocks

The exporter writes them; each backend's passes turn those it has a kernel for into that, `PlainRowsPass` the others
into plain arithmetic.
"""

from __future__ import annotations

from typing import Any

from onnx.defs import OpSchema
from onnxscript import evaluator

DOMAIN = "graphopt"

_INTEGERS = ("T", ["tensor(uint8)", "tensor(int8)"], "")
_REALS = ("F", ["tensor(float)", "tensor(float16)", "tensor(double)", "tensor(bfloat16)"], "")


def _schema(name: str, inputs: dict[str, str], output: str, attributes: tuple[str, ...]) -> OpSchema:
    return OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter(*item) for item in inputs.items()],
        outputs=[OpSchema.FormalParameter("result", output)],
        type_constraints=[_INTEGERS, _REALS],
        attributes=[OpSchema.Attribute(name, OpSchema.AttrType.INT, "", required=True) for name in attributes],
    )


_UNPACK = _schema("Unpack", {"packed": "tensor(uint8)"}, "T", ("size", "bits", "low"))
_BLOCKS = _schema("DequantizeBlocks", {"integers": "T", "scale": "F", "zero_point": "T"}, "F", ("axis", "block"))


def unpack(packed: Any, size: int, bits: int, low: int) -> Any:
    """Write a call of `graphopt::unpack`."""
    return _call(_UNPACK, (packed,), {"size": size, "bits": bits, "low": low})


def dequantize_blocks(integers: Any, scale: Any, zero_point: Any, axis: int, block: int) -> Any:
    """Write a call of `graphopt::dequantize` with blocks."""
    return _call(_BLOCKS, (integers, scale, zero_point), {"axis": axis, "block": block})


def _call(schema: OpSchema, inputs: tuple[Any, ...], attributes: dict[str, int]) -> Any:
    recorder: Any = evaluator.default()  # the exporter's, while it translates
    return recorder.eval(schema, inputs, attributes)
