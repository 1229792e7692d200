"""Target description: what a backend's runtime can do well, as plain data that passes read.

Passes are written against this description and never ask which target it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import lcm
from typing import Literal

Granularity = Literal["tensor", "channel"]


@dataclass(frozen=True, slots=True)
class IntegerFormat:
    """How a tensor may be stored as integers.

    A symmetric format has zero point `(low + high + 1) // 2` rounded to 0 for signed ranges.
    """

    dtype: Literal["int8", "uint8"]
    symmetric: bool
    low: int  # smallest stored value
    high: int  # largest stored value
    granularity: Granularity = "tensor"


@dataclass(frozen=True, slots=True)
class OperatorRule:
    """How one operator reaches the runtime's integer kernel.

    Attributes:
        operator: ATen name without overload, "conv2d"; several names that behave alike share one rule each.
        quantize_inputs: whether its activation inputs must come through a quantize/dequantize pair.
        quantize_output: whether the value it hands on must be quantized as well for the kernel to fuse.
        weight_axis: axis of the weight along which scales may differ, None for per-tensor or no weight.
        same_scale: whether output and inputs share one scale (max_pool, reshape, and the like).
        bias: how the bias is stored next to an integer kernel.
        absorbs: activations that run inside its kernel when they follow it directly.
    """

    operator: str
    quantize_inputs: bool = True
    quantize_output: bool = True
    weight_axis: int | None = None
    same_scale: bool = False
    bias: Literal["float", "int32"] = "float"
    absorbs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TargetDescription:
    """What passes need to know about a runtime.

    Attributes:
        name: the backend's name, for messages only.
        opset: ONNX opset that lowering emits.
        activation: integer format of activations.
        weight: integer format of weights.
        operators: operators with an integer kernel; everything else stays float.
        channel_multiple: channel counts the runtime's kernels like best.
        rank_multiple: the same for the inner size of factorised layers.
    """

    name: str
    opset: int
    activation: IntegerFormat
    weight: IntegerFormat
    operators: tuple[OperatorRule, ...] = ()
    channel_multiple: int = 1
    rank_multiple: int = 1
    notes: tuple[str, ...] = field(default=())

    def rule(self, operator: str) -> OperatorRule | None:
        """Return the rule of an operator, None if the runtime has no integer kernel for it."""
        return next((rule for rule in self.operators if rule.operator == operator), None)


def channel_multiple(targets: tuple[TargetDescription, ...]) -> int:
    """Return the least common multiple of the channel alignments of several targets, 1 for none."""
    return lcm(*(target.channel_multiple for target in targets))


def rank_multiple(targets: tuple[TargetDescription, ...]) -> int:
    """Return the least common multiple of the rank alignments of several targets, 1 for none."""
    return lcm(*(target.rank_multiple for target in targets))
