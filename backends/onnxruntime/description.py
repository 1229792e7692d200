"""What ONNX Runtime's CPU kernels can do with integers, measured on onnxruntime 1.31.1 (x86 with VNNI).

Activations are uint8: an int8 value with several readers keeps every kernel around it float. Weights are int8,
symmetric, per output channel: uint8 weights or int8 activations reach kernels several times slower. A kernel fuses
only where its result is quantized too, except that of a product without a bias, which is faster (and four times more
exact) with a float result.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from graphopt.quantization.formats import IntegerFormat
from graphopt.targets.costs import read_costs
from graphopt.targets.description import FloatKernels, OperatorRule, Scales, StoredRule, TargetDescription

# Clamps that the range of the quantization behind them carries out; the runtime would need them gone to fuse.
_CLAMPS = ("relu", "relu6", "hardtanh", "clamp", "clamp_min")

_BOTH: tuple[Scales, ...] = ("static", "dynamic")  # ConvInteger is slower than float: convolutions have one

_CONVOLUTIONS = tuple(
    OperatorRule(f"conv{rank}d", output="always", by_channel=True, bias="float", absorbs=_CLAMPS) for rank in (1, 2)
)
_PRODUCTS = (
    # A float bias keeps a Gemm float; an int32 one reaches QGemm, with or without a quantized result.
    OperatorRule("gemm", output="wanted", scales=_BOTH, by_channel=True, bias="int32", absorbs=_CLAMPS),
    # MatMulIntegerToFloat; quantizing the result of a transformer's products costs four times the error.
    OperatorRule("matmul", output="never", scales=_BOTH, by_channel=True),
)
_RECURRENT = (OperatorRule("lstm", output="never", scales=("dynamic",)),)  # DynamicQuantizeLSTM
_JOINS = (
    OperatorRule("add", role="join", absorbs=_CLAMPS),
    OperatorRule("mul", role="join", absorbs=_CLAMPS),
    OperatorRule("cat", role="join"),
    OperatorRule("sigmoid", role="join"),
    OperatorRule("leaky_relu", role="join"),
    OperatorRule("relu", role="join"),  # written as Add of 0 or as LeakyRelu; its own form only clamps
    OperatorRule("hardsigmoid", role="join"),  # likewise, of the operand's integers with another zero point
    OperatorRule("avg_pool2d", role="join"),
    OperatorRule("global_average_pool", role="join"),
)
_SAME_SCALE = (OperatorRule("max_pool2d", role="same_scale"), OperatorRule("upsample_nearest2d", role="same_scale"))
_MOVES = tuple(
    OperatorRule(name, role="move")
    for name in (
        "view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "unsqueeze", "squeeze", "slice",
        "select", "narrow", "split", "split_with_sizes", "chunk", "unbind", "getitem", "contiguous", "pad", "expand",
        "channel_shuffle", "movedim", "swapaxes",
    )
)  # fmt: skip

_WEIGHT = IntegerFormat(8, granularity="channel", narrow=True)

_BLOCKS = (16, 32, 64, 128, 256)

DESCRIPTION = TargetDescription(
    name="onnxruntime",
    opset=20,
    activation=IntegerFormat(8, signed=False, symmetric=False),
    weight=_WEIGHT,
    scales_as_convolutions=True,
    table=_WEIGHT,
    operators=(*_CONVOLUTIONS, *_PRODUCTS, *_RECURRENT, *_JOINS, *_SAME_SCALE, *_MOVES),
    stored=(  # MatMulNBits and GatherBlockQuantized
        StoredRule("linear", bits=(2, 4, 8), blocks=_BLOCKS),
        StoredRule("embedding", bits=(2, 4, 8), blocks=_BLOCKS),
    ),
    channel_multiple=16,  # NCHWc and VNNI kernels work on blocks of 16 channels
    depthwise_multiple=16,  # with VNNI; see `graphopt.passes.quantization.widths`
    depthwise_uneven=1.9,  # with 8 channels more than a multiple; 3.5 with 15 (24 to 248 channels of 7 x 7 to 28 x 28)
    rank_multiple=16,
    # Its CPU kernels compute in float32: around what is to be computed in float16 it converts back and forth.
    floats=(FloatKernels("float16", computes=False),),
    costs=read_costs(Path(__file__).with_name("costs_x86_vnni.json")),
)

_SEVEN_BITS = IntegerFormat(7, granularity="channel", narrow=True)

# Two products of 255 and 63 fit into the 16 bits that such processors add them up in: exact without asking for it.
# ResNet-18: 1.87x of float where the precise session gives 1.40x, at 31.5 dB and 34.2 dB (AVX2, one thread).
DESCRIPTION_AVX2 = dataclasses.replace(
    DESCRIPTION,
    name="onnxruntime-x86-avx2",
    weight=_SEVEN_BITS,
    table=_SEVEN_BITS,
    depthwise_multiple=1,
    depthwise_uneven=1.0,  # nobody has timed wider ones there
    costs=read_costs(Path(__file__).with_name("costs_x86_avx2.json")),
)

# Products of 8 bits are exact there; nobody has timed a kernel.
DESCRIPTION_ARM = dataclasses.replace(
    DESCRIPTION,
    name="onnxruntime-arm",
    depthwise_multiple=1,
    depthwise_uneven=1.0,
    costs=None,
)
