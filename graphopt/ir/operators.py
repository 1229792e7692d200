"""What operators are called, and the families that analyses and passes speak of.

    schema_name(target)   "aten::linear", "graphopt::quantize", "getitem"      says exactly which operator
    short_name(node)      "linear", "quantize", "getitem", "relu_"             as people read it: reports, addresses
    plain_name(node)      "mul" for `aten.multiply`, "lib::linear" for another's `linear`    what it computes

    if node in CONVOLUTIONS: ...

A member of a family is an ATen operator, or one overload of it ("div.Tensor": the one that does not round). What
computes the same belongs to the family too: its in-place twin (`relu_`), its copying twin (`permute_copy`), its
synonyms (`multiply`). Another library's operator of the same name does not.

The axis rules and the proof keep tables of their own on purpose: each must be able to show the others wrong.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from torch import fx

from graphopt.ir.torch_internals import OpOverload, OpOverloadPacket

_ATEN = "aten::"

# other spellings of ATen operators; `torch.export` keeps them as the model's author wrote them (torch 2.13)
_SYNONYMS = {
    "absolute": "abs",
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "divide": "div",
    "linalg_matmul": "matmul",
    "moveaxis": "movedim",
    "multiply": "mul",
    "negative": "neg",
    "special_log_softmax": "log_softmax",
    "special_softmax": "softmax",
    "subtract": "sub",
    "swapdims": "swapaxes",
    "true_divide": "div",
}


def schema_name(target: Any) -> str:
    """Return the name by which a call target is known: `aten::linear`, `getitem`."""
    if isinstance(target, OpOverload):
        return str(target._schema.name)
    if isinstance(target, OpOverloadPacket):
        return str(target._qualified_op_name)
    return str(getattr(target, "__name__", target))


def short_name(node: fx.Node) -> str:
    """Return the name of the operator `node` calls without its library: "conv2d"; "" if it calls none."""
    return schema_name(node.target).rpartition("::")[2] if node.op == "call_function" else ""


def plain_name(node: fx.Node) -> str:
    """Return the name of the ATen operator `node` calls, synonyms resolved; another library's keeps its prefix."""
    if node.op != "call_function":
        return ""
    name = schema_name(node.target).removeprefix(_ATEN)
    return _SYNONYMS.get(name, name)


@functools.cache
def kinds_of_arguments(operator: OpOverload[..., Any]) -> dict[str, str]:
    """Return what the schema of an operator takes for each argument, optional or not: "Tensor", "ScalarType", .."""
    kinds = {argument.name: str(argument.real_type) for argument in operator._schema.arguments}
    return {name: re.sub(r"Optional\[(.*)\]", r"\1", kind) for name, kind in kinds.items()}


@functools.cache
def functional_twin(target: Any) -> OpOverload | None:
    """Return the functional overload of an in-place ATen operator: of the same name, or with the same arguments."""
    if not isinstance(target, OpOverload) or target.namespace != "aten":
        return None
    name = target._schema.name.removeprefix(_ATEN)
    first = target._schema.arguments[0] if target._schema.arguments else None
    if not name.endswith("_") or first is None or first.alias_info is None or not first.alias_info.is_write:
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)

    def taken(operator: OpOverload) -> list[tuple[str, str]]:
        first, *others = operator._schema.arguments  # `self`, or `input` of `dropout`
        return [("", str(first.type)), *((argument.name, str(argument.type)) for argument in others)]

    for overload in (target._overloadname, *(packet.overloads() if packet is not None else ())):
        twin = getattr(packet, overload, None)
        if isinstance(twin, OpOverload) and taken(twin) == taken(target):
            return twin
    return None


def twins(target: OpOverload[..., Any]) -> list[str]:
    """Return the schema name of an operator and those of the ones that compute the same: `relu_`, `relu`."""
    name = str(target._schema.name)
    shared = (name.removesuffix("_"), name.removesuffix("_copy"))
    return [name, *(twin for twin in shared if twin != name and not twin.endswith("_"))]


def writes_in_place(node: fx.Node) -> bool:
    """Whether `node` calls an operator that writes to one of its arguments."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


class Family:
    """Operators of one kind. Calls (`node in family`) and call targets (`node.target in family`) may be asked for.

    Args:
        names: members, "linear", or single overloads, "div.Tensor".
    """

    def __init__(self, *names: str) -> None:
        self.names = frozenset(names)

    def __contains__(self, item: object) -> bool:
        """Whether a call, or what it calls, is a member."""
        if isinstance(item, fx.Node):
            if item.op != "call_function":
                return False
            item = item.target
        return not self.names.isdisjoint(_known_as(item))

    def __or__(self, other: Family) -> Family:
        """Return the members of both."""
        return Family(*self.names, *other.names)


@functools.cache
def _known_as(target: Any) -> frozenset[str]:
    if isinstance(target, OpOverload):
        names = [name.removeprefix(_ATEN) for name in twins(target)]
        plain = {_SYNONYMS.get(name, name) for name in names}
        return frozenset(plain | {f"{name}.{target._overloadname}" for name in plain})
    return frozenset({schema_name(target).removeprefix(_ATEN)})


def _ranks(*stems: str) -> tuple[str, ...]:
    return tuple(f"{stem}{rank}d" for stem in stems for rank in (1, 2, 3))


# What sums products, and most of the time is spent in.
CONVOLUTIONS = Family(*_ranks("conv"))
TRANSPOSED_CONVOLUTIONS = Family(*_ranks("conv_transpose"))
GENERAL_CONVOLUTIONS = Family("convolution", "_convolution")  # an argument says whether they are transposed
ALL_CONVOLUTIONS = CONVOLUTIONS | TRANSPOSED_CONVOLUTIONS | GENERAL_CONVOLUTIONS
PRODUCTS = Family(
    *("linear", "mm", "bmm", "addmm", "baddbmm", "addbmm", "matmul", "mv", "addmv", "dot", "vdot", "inner"),
    *("einsum", "tensordot", "bilinear", "linalg_multi_dot", "linalg_vecdot", "chain_matmul"),
)
ATTENTION = Family("scaled_dot_product_attention")
RECURRENT_LAYERS = Family("lstm", "gru", "rnn_tanh", "rnn_relu")
RECURRENT = RECURRENT_LAYERS | Family("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
EMBEDDINGS = Family("embedding", "embedding_bag")

# Element by element, of one tensor.
ACTIVATIONS = Family(
    *("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid", "log_sigmoid", "tanh"),
    *("hardtanh", "hardsigmoid", "hardswish", "softplus", "hardshrink", "softshrink", "threshold"),
)
ADDITIONS = Family("add.Tensor", "add.Scalar")
SUBTRACTIONS = Family("sub.Tensor", "sub.Scalar")
SUMS = ADDITIONS | SUBTRACTIONS
MULTIPLICATIONS = Family("mul.Tensor", "mul.Scalar")
DIVISIONS = Family("div.Tensor", "div.Scalar")  # without those that round

NORMALISATIONS = Family(
    *("batch_norm", "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_impl_index"),
    *("_native_batch_norm_legit", "_native_batch_norm_legit_functional", "_native_batch_norm_legit_no_training"),
    *("instance_norm", "group_norm", "native_group_norm", "layer_norm", "native_layer_norm", "rms_norm"),
)
SOFTMAXES = Family("softmax", "_softmax")
LOG_SOFTMAXES = Family("log_softmax", "_log_softmax")
AVERAGE_POOLS = Family(*_ranks("avg_pool"))
ADAPTIVE_AVERAGE_POOLS = Family(*_ranks("adaptive_avg_pool"))
MAX_POOLS = Family(*_ranks("max_pool"))
UPSAMPLES = Family(
    *(f"{prefix}{rank}d" for prefix in ("upsample_nearest", "_upsample_nearest_exact") for rank in (1, 2, 3)),
    *("upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d"),
)

# What drops values in training and hands its input on otherwise.
SCALED_DROPOUTS = Family("dropout", "feature_dropout")  # the mean of the result is the input
DROPOUTS = SCALED_DROPOUTS | Family("alpha_dropout", "feature_alpha_dropout")

# What moves values and computes none.
COPIES = Family("alias", "clone", "contiguous", "detach", "lift_fresh", "positive")  # the same values, all of them
CASTS = Family("to", "type_as", "_to_copy")
RESHAPES = Family(  # without "view.dtype", which reads the same bytes as other numbers
    *("view.default", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"),
    *("ravel", "_unsafe_view"),
)
REORDERS = Family("permute", "transpose", "swapaxes", "t", "movedim", "numpy_T", "mT", "adjoint")
EXPANSIONS = Family("expand", "expand_as", "broadcast_to", "repeat", "tile")
PARTS = Family(
    *("slice", "select", "narrow", "unbind", "chunk", "split", "split_with_sizes", "tensor_split"),
    *("unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes", "getitem"),
)
SHUFFLES = Family("roll", "flip", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
# always views: the result never has memory of its own
VIEWS = REORDERS | Family(
    *("alias", "detach", "view.default", "view.dtype", "view_as", "expand", "expand_as", "broadcast_to", "squeeze"),
    *("unsqueeze", "unflatten", "slice", "select", "narrow"),
)
MOVES = COPIES | RESHAPES | REORDERS | EXPANSIONS | PARTS | SHUFFLES
CARRYING = COPIES | CASTS | RESHAPES | REORDERS | PARTS | DROPOUTS  # a value, or a part of it, is what it was

# What reads no more of a tensor than size, dtype and device.
SIZES = Family("sym_size", "sym_stride", "sym_numel")
FILLED_LIKE = Family(
    *("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "fill", "zero", "scalar_tensor")
)
DRAWN_LIKE = Family("rand_like", "randn_like", "randint_like")
UNINITIALISED = Family(
    *("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"),
    *("prims::empty", "prims::empty_strided", "prims::empty_permuted"),
)

# What may return its input, or a view of it, though its schema does not say so.
SILENT_VIEWS = DROPOUTS | Family(
    *("atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors", "cartesian_prod", "data", "einsum", "meshgrid"),
    *("sum_to_size", "to_dense", "type_as", "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes", "_unsafe_view"),
    *("conj_physical", "dequantize", "lift", "_cast_Byte", "_cast_Char", "_cast_Double", "_cast_Float", "_cast_Half"),
    *("_cast_Int", "_cast_Long", "_cast_Short"),
)
