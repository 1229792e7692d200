"""Target description: what a backend's runtime can do well, as plain data that passes read.

Passes are written against this description and never ask which target it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import Literal

from graphopt.quantization.formats import IntegerFormat
from graphopt.targets.costs import CostTable

Scales = Literal["static", "dynamic"]
Role = Literal["compute", "join", "same_scale", "move", "read"]


@dataclass(frozen=True, slots=True)
class OperatorRule:
    """How one operator reaches the runtime's integer kernel, or how it behaves next to one.

    Kernels are named after the ATen operator ("conv2d", "add", "max_pool2d"), with these exceptions: "gemm" is a
    matrix times a constant matrix with a bias; "matmul" any other product with a constant matrix;
    "global_average_pool" a mean over all spatial axes.

    Roles:
        compute: pays for quantizing its operands; integer chains start and end here.
        join: has an integer kernel that pays only inside a chain: all its operands are integers already, or some
            are and everything that reads its result is an integer kernel.
        same_scale: like join; result and operand share one scale (max_pool).
        move: like same_scale, and only moves values around (reshape, slice, pad): it runs on the stored integers.
        read: stays float, but reads the quantized value where its operand has been quantized for someone else.

    Attributes:
        operator: name of the kernel.
        role: see above.
        output: of a compute kernel, whether its result is quantized: "always" (the kernel fuses only then), "wanted"
            (where integer kernels alone read it) or "never".
        scales: of a compute kernel, when the scale of its operand may be chosen: "static", from data beforehand, or
            "dynamic", by the kernel itself from each batch; its result is then float.
        by_channel: whether scales of the weight may differ by output channel.
        bias: how the bias is stored next to an integer kernel.
        absorbs: activations that move in front of the quantization of its result when they alone read it; with
            asymmetric activations those whose clamp the integer range carries out itself are dropped.
    """

    operator: str
    role: Role = "compute"
    output: Literal["always", "wanted", "never"] = "always"
    scales: tuple[Scales, ...] = ("static",)
    by_channel: bool = False
    bias: Literal["float", "int32"] = "float"
    absorbs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SparseFormat:
    """Which sparse weights the runtime's kernels take: along the input channels, for each output and kernel position.

    Attributes:
        nonzeros: of each group at most so many weights are not zero.
        group: consecutive input channels that make a group.
        inputs_multiple: input channels of a layer the kernels take come in multiples of this.
        outputs_multiple: likewise output channels.
    """

    nonzeros: int = 2
    group: int = 4
    inputs_multiple: int = 1
    outputs_multiple: int = 1


@dataclass(frozen=True, slots=True)
class FloatKernels:
    """What the runtime can do in a floating type of 16 bits.

    Attributes:
        dtype: "float16" or "bfloat16".
        computes: whether kernels compute in it; if not, weights can be stored in it, and are converted when loaded.
        without: operators that have no kernel in it, by their ATen names.
    """

    dtype: str
    computes: bool = True
    without: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StoredRule:
    """As which integers an operator that computes in floating point reads its weight.

    Attributes:
        operator: "linear", a product with a stored matrix, or "embedding", a read of rows of one.
        bits: of an integer.
        blocks: numbers of consecutive inputs that may share a scale; all inputs of an output always may.
        symmetric: whether all zero points must be in the middle of the range.
        ragged: whether the last block of a row may be shorter than the others.
    """

    operator: Literal["linear", "embedding"]
    bits: tuple[int, ...]
    blocks: tuple[int, ...]
    symmetric: bool = False
    ragged: bool = True


@dataclass(frozen=True, slots=True)
class TargetDescription:
    """What passes need to know about a runtime.

    Attributes:
        name: the backend's name.
        opset: ONNX opset that lowering emits.
        activation: integer format of activations.
        weight: integer format of weights.
        operators: how operators reach integer kernels; those without a rule stay float.
        channel_multiple: channel counts the runtime's kernels like best.
        depthwise_multiple: the same for those of its integer kernel for depthwise convolutions, which is so much slower
            otherwise that channels may be worth adding; 1 for no such kernel.
        depthwise_uneven: how many times as long it takes otherwise, for each channel.
        rank_multiple: the same for the inner size of factorised layers.
        sparsity: the pattern of sparse weights that has kernels, None for no such kernels.
        stored: weights that are read as integers by operators that compute in floating point.
        scales_as_convolutions: whether what scales each channel between integers (a norm of stored statistics, PReLU)
            is best written as a convolution.
        table: integer format of embedding tables whose rows become floating when they are read, None for none.
        floats: what it can do in floating types of 16 bits; others it refuses.
        costs: how long its kernels take, None where nobody has measured them.
        folds: whether it computes what depends on stored tensors alone once, when it loads a file, not in every run.
    """

    name: str
    opset: int
    activation: IntegerFormat
    weight: IntegerFormat
    operators: tuple[OperatorRule, ...] = ()
    channel_multiple: int = 1
    depthwise_multiple: int = 1
    depthwise_uneven: float = 1.0
    rank_multiple: int = 1
    sparsity: SparseFormat | None = None
    table: IntegerFormat | None = None
    scales_as_convolutions: bool = False
    floats: tuple[FloatKernels, ...] = ()
    stored: tuple[StoredRule, ...] = ()
    folds: bool = True
    costs: CostTable | None = None

    def rule(self, operator: str) -> OperatorRule | None:
        """Return the rule of an operator, None if the runtime has no integer kernel for it."""
        return next((rule for rule in self.operators if rule.operator == operator), None)

    def float_kernels(self, dtype: str) -> FloatKernels | None:
        """Return what the runtime can do in a floating type of 16 bits, None if it refuses it."""
        return next((kernels for kernels in self.floats if kernels.dtype == dtype), None)

    def stored_rule(self, operator: str) -> StoredRule | None:
        """Return as what an operator reads stored integers, None if the runtime has no kernel that does."""
        return next((rule for rule in self.stored if rule.operator == operator), None)


def channel_multiple(targets: tuple[TargetDescription, ...]) -> int:
    """Return the least common multiple of the channel alignments of several targets, 1 for none."""
    return lcm(*(target.channel_multiple for target in targets))


def rank_multiple(targets: tuple[TargetDescription, ...]) -> int:
    """Return the least common multiple of the rank alignments of several targets, 1 for none."""
    return lcm(*(target.rank_multiple for target in targets))
