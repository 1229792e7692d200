"""What TensorRT's compiler can do with integers, confirmed on tensorrt-rtx 1.7.1.

Everything is symmetric int8 with zero point 0; other zero points, uint8 and int32 biases are refused. Quantization
stands behind the activation, and between a convolution and its residual add there is none: the add runs in the
convolution's epilogue.
"""

from __future__ import annotations

from graphopt.quantization.formats import IntegerFormat
from graphopt.targets.description import FloatKernels, OperatorRule, SparseFormat, StoredRule, TargetDescription

# Run in the epilogue of the kernel in front, before its result is quantized.
_ACTIVATIONS = (
    "relu",
    "relu6",
    "hardtanh",
    "clamp",
    "clamp_min",
    "hardswish",
    "silu",
    "leaky_relu",
    "sigmoid",
    "gelu",
    "tanh",
)

_CONVOLUTIONS = tuple(
    OperatorRule(name, output="wanted", by_channel=True, absorbs=_ACTIVATIONS)
    for name in ("conv1d", "conv2d", "conv3d", "conv_transpose2d")
)
_PRODUCTS = (
    OperatorRule("gemm", output="wanted", absorbs=_ACTIVATIONS),
    OperatorRule("matmul", output="never", by_channel=True),
)
_CHAINS = (
    OperatorRule("add", role="read"),
    OperatorRule("max_pool2d", role="same_scale"),
)
_MOVES = tuple(
    OperatorRule(name, role="move")
    for name in ("view", "reshape", "flatten", "permute", "transpose", "unsqueeze", "squeeze", "contiguous")
)

DESCRIPTION = TargetDescription(
    name="tensorrt",
    opset=20,
    activation=IntegerFormat(8),
    weight=IntegerFormat(8, granularity="channel", narrow=True),
    operators=(*_CONVOLUTIONS, *_PRODUCTS, *_CHAINS, *_MOVES),
    # DequantizeLinear with blocks; what it takes for a last block that is shorter is not documented.
    stored=(StoredRule("linear", bits=(4, 8), blocks=(16, 32, 64, 128, 256), symmetric=True, ragged=False),),
    # Of weights looked up by stored bytes, the builder keeps four bytes for each of those, not what is looked up.
    folds=False,
    channel_multiple=32,  # tensor-core tiles of int8 channels
    rank_multiple=32,
    floats=(
        FloatKernels("float16"),
        FloatKernels(
            "bfloat16",  # parser and builder refuse these (1.7.1)
            without=("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "gru", "hardswish"),
        ),
    ),
    # Sparse tensor cores (compute capability 8.0 on) read two of every four input channels; the alignment is what
    # NVIDIA's own recipe asks of a layer (apex, contrib/sparsity: inputs by 16, outputs by 8).
    sparsity=SparseFormat(nonzeros=2, group=4, inputs_multiple=16, outputs_multiple=8),
)
