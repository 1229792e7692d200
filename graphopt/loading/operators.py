"""Which operators an exported program from a stranger may call.

`torch.export.load` resolves a node's target by `getattr` from `torch`, `operator` or `math` and then calls
whatever it found (torch/_export/serde/serialize.py, `deserialize_operator`): `torch.ops.aten.relu.default`,
but also `torch.hub.load` or `_operator.methodcaller`. Here a target must be one of the named scalar
operators, a higher-order operator of a short list, an overload that the dispatcher knows in namespace `graphopt`, or
one in `aten` that stands for a public function of torch, belongs to its core set, or is named here. Those check their
arguments, or `capturing/unchecked_arguments` does; many of the 2,000 others are parts of one that has checked them
(`aten._reshape_alias` reads beyond a tensor's memory when asked to). It must work on tensors and take no text but what
is known to be a mode.

Reads the private `OpOverload._schema`; torch has no public way to an operator's schema.
"""

from __future__ import annotations

import functools
import importlib
import re

import torch

from graphopt.ir.torch_internals import OpOverload, OpOverloadPacket
from graphopt.loading.refusal import HostileError

NAMESPACES = ("aten", "graphopt")

_SCALAR_NAMES = """
    _operator.eq _operator.ne _operator.le _operator.ge _operator.lt _operator.gt _operator.neg _operator.pos
    _operator.mul _operator.add _operator.sub _operator.floordiv _operator.mod _operator.pow _operator.truediv
    _operator.and_ _operator.or_ _operator.lshift _operator.rshift _operator.getitem
    math.trunc math.floor math.ceil math.sqrt
    torch.sym_not torch.sym_int torch.sym_float torch.sym_ite torch.sym_max torch.sym_min torch.sym_sqrt
    torch.sym_sum torch._sym_sqrt torch._sym_log2
"""
_HIGHER_ORDER_NAMES = """
    wrap_with_set_grad_enabled wrap_with_autocast cond while_loop scan associative_scan map_impl
    invoke_subgraph flex_attention
"""
_ASSERTION_NAMES = "sym_constrain_range.default sym_constrain_range_for_size.default _assert_scalar.default"
_TEXT_ARGUMENT_NAMES = """
    UPLO activation approximate assert_msg driver equation indexing interpolation mode norm ord p pad_mode
    padding padding_mode padding_side reduce rounding_mode side
"""
_PLAIN_TARGETS = frozenset(
    [
        *_SCALAR_NAMES.split(),
        *(f"torch.ops.higher_order.{name}" for name in _HIGHER_ORDER_NAMES.split()),
        *(f"torch.ops.aten.{name}" for name in _ASSERTION_NAMES.split()),
    ]
)
_PUBLIC = (  # where torch keeps its functions, and what the names of the operators behind them start with
    (torch.Tensor, ""),
    (torch.nn.functional, ""),
    (torch.linalg, "linalg_"),
    (torch.fft, "fft_"),
    (torch.special, "special_"),
)
# Functions of `torch` alone, and what public functions become in a graph.
_FURTHER_NAMES = """
    atleast_1d atleast_2d atleast_3d block_diag broadcast_tensors cartesian_prod chain_matmul column_stack
    concat concatenate dstack hstack row_stack stack vstack meshgrid einsum tensordot gradient trapezoid trapz
    cumulative_trapezoid cdist vander complex polar view_as_complex view_as_real isin bucketize searchsorted rsub
    std_mean var_mean frobenius_norm nuclear_norm native_norm norm_except_dim result_type unique_dim
    arange eye linspace logspace ones ones_like zeros zeros_like zero full_like empty_like empty_permuted fill
    fill_diagonal copy lift lift_fresh lift_fresh_copy nonzero_numpy tril_indices triu_indices
    bartlett_window blackman_window hamming_window hann_window kaiser_window
    bernoulli binomial cauchy exponential geometric log_normal normal poisson rand_like randint randint_like randn_like
    random uniform matrix_H numpy_T
    lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell pad_sequence
    feature_dropout rrelu_with_noise log_sigmoid log_sigmoid_forward
    cross_entropy_loss nll_loss_nd nll_loss2d nll_loss_forward nll_loss2d_forward multilabel_margin_loss_forward
    affine_grid_generator grid_sampler grid_sampler_3d im2col replication_pad1d
    upsample_bicubic2d upsample_linear1d upsample_nearest1d upsample_nearest3d upsample_trilinear3d
    fake_quantize_per_channel_affine fake_quantize_per_channel_affine_cachemask
    fake_quantize_per_tensor_affine fake_quantize_per_tensor_affine_cachemask
    alias_copy as_strided_copy detach_copy diagonal_copy expand_copy permute_copy select_copy slice_copy split_copy
    split_with_sizes_copy squeeze_copy t_copy transpose_copy unbind_copy unfold_copy unsqueeze_copy view_copy
    view_as_complex_copy view_as_real_copy sym_constrain_range sym_constrain_range_for_size
    __and__ __or__ __xor__ __lshift__ __rshift__ __iand__ __ior__ __ixor__ __ilshift__ __irshift__
    _add_relu _addmm_activation _aminmax _trilinear _euclidean_dist _int_mm _dim_arange
    _cast_Byte _cast_Char _cast_Double _cast_Float _cast_Half _cast_Int _cast_Long _cast_Short
    _conj _conj_copy _conj_physical _neg_view _neg_view_copy _fft_c2c _is_all_true _is_any_true _shape_as_tensor
    _assert_async _assert_tensor_metadata _functional_assert_async
    _linalg_det _linalg_eigh _linalg_slogdet _linalg_solve_ex _linalg_svd _logcumsumexp
    _native_batch_norm_legit_functional _fused_rms_norm _weight_norm
    embedding_renorm _embedding_bag_forward_only histogramdd
    _convolution _convolution_mode _pad_circular _pad_enum _prelu_kernel _masked_softmax _safe_softmax
    _unique _unique2 _unsafe_index _unsafe_index_put _unsafe_view
    _fake_quantize_per_tensor_affine_cachemask_tensor_qparams
    _upsample_bicubic2d_aa _upsample_bilinear2d_aa
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
"""
_FURTHER = frozenset(_FURTHER_NAMES.split())
# Public, but for sparse and nested layouts, or trusting what their caller says of memory or what a factorisation
# returned (torch 2.13); no part of an inference; dividing the smallest integer by -1; or running as long as a number
# says.
_UNSUITED = re.compile(
    "sparse|nested|jagged|_(coo|csr|csc|bsr|bsc)|^(set|resize|smm|sspaddmm|coalesce|values|slice_inverse|to_mkldnn)_?$|"
    "(col|row|^)_?indices$|set_data|resize_|padded_tensor|to_dense|as_strided_$|backward|_polynomial_|"
    "linalg_(eig|eigvals|ldl_.*)$|ctc_loss|combinations|^lcm_?$|slow_conv|thnn_conv"
)
# Of packed sequences, which no export holds, and without the type that a number stands for.
_UNSUITED_OVERLOADS = frozenset({"data", "prim_Device", "prim_dtype", "prim_other"})
_TEXT_ARGUMENTS = frozenset(_TEXT_ARGUMENT_NAMES.split())
_TARGET = re.compile(r"torch\.ops\.(\w+)\.(\w+)\.(\w+)", re.ASCII)


@functools.lru_cache(maxsize=8192)
def check_operator(target: str) -> None:
    """Raise `HostileError` unless `target` names an operator of the allow-list."""
    if target in _PLAIN_TARGETS:
        return
    match = _TARGET.fullmatch(target)
    if match is None:
        raise HostileError(f"it calls `{target[:120]}`, which is not an operator on tensors")
    namespace, name, overload = match.groups()
    if namespace not in NAMESPACES:
        raise HostileError(
            f"it calls the custom operator `{target[:120]}`, and only torch's own are known to be harmless"
        )
    if namespace == "graphopt":
        importlib.import_module("graphopt.quantization.ops")  # registers them
    packet = getattr(getattr(torch.ops, namespace), name, None)
    if not isinstance(packet, OpOverloadPacket) or overload not in packet.overloads():  # type: ignore[no-untyped-call]
        raise HostileError(f"it calls `{target[:120]}`, an operator that torch {torch.__version__} does not have")
    if namespace == "aten" and not _is_tensor_operator(operator := getattr(packet, overload)):
        raise HostileError(f"it calls `{target[:120]}`, which is not an operator on tensors")
    if namespace == "aten" and any(argument.is_out for argument in operator._schema.arguments):
        raise HostileError(
            f"it calls `{target[:120]}`, which writes to memory of another result (`out=`); export the program again "
            "with `.run_decompositions()`, which leaves no such calls"
        )
    unsuited = _UNSUITED.search(name) or overload in _UNSUITED_OVERLOADS
    if namespace == "aten" and (unsuited or not _is_known(name, operator)):
        raise HostileError(f"it calls `{target[:120]}`, which no public function of torch for dense tensors stands for")


def _is_known(name: str, operator: OpOverload) -> bool:
    base = name if name.endswith("__") else name.removesuffix("_")
    public = not base.startswith("_") and any(
        base.startswith(prefix) and hasattr(home, base.removeprefix(prefix)) for home, prefix in _PUBLIC
    )
    return public or base in _FURTHER or torch.Tag.core in operator.tags


def _is_tensor_operator(operator: OpOverload) -> bool:
    schema = operator._schema
    values = [*schema.arguments, *schema.returns]
    texts = [arg.name for arg in schema.arguments if re.search(r"\bstr\b", str(arg.type))]
    return any("Tensor" in str(value.type) for value in values) and _TEXT_ARGUMENTS.issuperset(texts)
