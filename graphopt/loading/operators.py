"""Which operators an exported program from a stranger may call.

`torch.export.load` resolves a node's target by `getattr` from `torch`, `operator` or `math` and then calls
whatever it found (torch/_export/serde/serialize.py, `deserialize_operator`): `torch.ops.aten.relu.default`,
but also `torch.hub.load` or `_operator.methodcaller`. Here a target must be one of the named scalar
operators, a higher-order operator of a short list, or an overload that the dispatcher knows in namespace
`graphopt`, or in `aten` if it works on tensors and takes no text but what is known to be a mode (so not
`aten.from_file` or `aten.save`, which open files).

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
    invoke_subgraph flex_attention auto_functionalized auto_functionalized_v2 out_dtype
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
# Operators that trust what their caller says of memory: of sparse and nested layouts, of where it lies, of its size.
_UNCHECKED = re.compile(
    "sparse|nested|jagged|_coo|_csr|_csc|_bsr|_bsc|unsafe|^set_|set_data|resize|from_blob|_impl_?$|_indices_copy|"
    "_values_copy|coalesced|to_dense|as_strided_$"
)
_CHECKED = frozenset(
    ["_unsafe_view", "_unsafe_index", "_unsafe_index_put", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk"]
)
_TEXT_ARGUMENTS = frozenset(_TEXT_ARGUMENT_NAMES.split())
_TARGET = re.compile(r"torch\.ops\.(\w+)\.(\w+)\.(\w+)", re.ASCII)


@functools.lru_cache(maxsize=8192)
def check_operator(target: str) -> None:
    """Raise `HostileError` unless `target` names an operator of the allow-list."""
    if target in _PLAIN_TARGETS:
        return
    match = _TARGET.fullmatch(target)
    if match is None:
        raise _refused(target)
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
    if namespace == "aten" and not _is_tensor_operator(getattr(packet, overload)):
        raise _refused(target)
    if namespace == "aten" and _UNCHECKED.search(name) and name not in _CHECKED:
        raise HostileError(f"it calls `{target[:120]}`, which takes its caller's word for where memory lies")


def _refused(target: str) -> HostileError:
    return HostileError(f"it calls `{target[:120]}`, which is not an operator on tensors")


def _is_tensor_operator(operator: OpOverload) -> bool:
    schema = operator._schema
    values = [*schema.arguments, *schema.returns]
    texts = [arg.name for arg in schema.arguments if re.search(r"\bstr\b", str(arg.type))]
    return any("Tensor" in str(value.type) for value in values) and _TEXT_ARGUMENTS.issuperset(texts)
