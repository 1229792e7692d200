"""Decompositions and solvers mix every row and column of a matrix, so both stay; batches of matrices pass.

inv: (batch, n, n) -> (batch, n, n)     svd: (batch, m, n) -> (batch, m, k), (batch, k), (batch, k, n)
"""

from __future__ import annotations

from collections.abc import Iterable

from graphopt.axes.call import Call
from graphopt.axes.layout import Dims, Layout, product
from graphopt.axes.registry import Result, rule
from graphopt.axes.rules.contraction import Operand, contract

_REASON = "rows and columns of a matrix are mixed"
_MATRIX = 2


@rule(
    "aten::_linalg_det",
    "aten::_linalg_eigh",
    "aten::_linalg_slogdet",
    "aten::_linalg_solve_ex",
    "aten::_linalg_svd",
    "aten::cholesky",
    "aten::cholesky_inverse",
    "aten::cholesky_solve",
    "aten::det",
    "aten::geqrf",
    "aten::inverse",
    "aten::linalg_cholesky",
    "aten::linalg_cholesky_ex",
    "aten::linalg_cond",
    "aten::linalg_det",
    "aten::linalg_eig",
    "aten::linalg_eigh",
    "aten::linalg_eigvals",
    "aten::linalg_eigvalsh",
    "aten::linalg_inv",
    "aten::linalg_inv_ex",
    "aten::linalg_ldl_factor",
    "aten::linalg_ldl_factor_ex",
    "aten::linalg_lu",
    "aten::linalg_lu_factor",
    "aten::linalg_lu_factor_ex",
    "aten::linalg_matrix_exp",
    "aten::linalg_matrix_norm",
    "aten::linalg_matrix_power",
    "aten::linalg_matrix_rank",
    "aten::linalg_pinv",
    "aten::linalg_qr",
    "aten::linalg_slogdet",
    "aten::linalg_solve",
    "aten::linalg_solve_ex",
    "aten::linalg_solve_triangular",
    "aten::linalg_svd",
    "aten::linalg_svdvals",
    "aten::logdet",
    "aten::matrix_exp",
    "aten::matrix_power",
    "aten::pinverse",
    "aten::qr",
    "aten::slogdet",
    "aten::svd",
    "aten::triangular_solve",
)
def of_matrices(call: Call) -> Result:
    operands = call.tensors()
    # Further positional arguments may name dimensions; operands of unequal rank may be batches of vectors.
    named = bool(call.node.kwargs.get("dim")) or len(call.node.args) > len(operands)
    if named or len({len(dims) for dims in operands}) > 1 or len(operands[0]) < _MATRIX:
        return _all_mixed(call, operands)
    batch = call.broadcast([dims[:-_MATRIX] for dims in operands])
    for dims in operands:
        call.freeze(dims[-_MATRIX:], _REASON)
    value = call.node.meta["val"]
    if not isinstance(value, list | tuple):
        return _result(call, batch, call.shape())
    return [_result(call, batch, call.shape(index)) for index in range(len(value))]


def _result(call: Call, batch: Dims, shape: tuple[object, ...]) -> Dims:
    rest = shape[len(batch) :]
    return (*batch, *call.axes(rest, call.because(_REASON)))


def _all_mixed(call: Call, operands: Iterable[Dims]) -> Result:
    for dims in operands:
        call.freeze(dims, _REASON)
    value = call.node.meta["val"]
    because = call.because(_REASON)
    if not isinstance(value, list | tuple):
        return call.axes(call.shape(), because)
    return [call.axes(call.shape(index), because) for index in range(len(value))]


@rule("aten::inner")
def inner(call: Call) -> Dims:
    """Sum over the last dimensions; all others of both operands stay."""
    a, b = call.dims("self"), call.dims("other")
    if not a or not b:
        return call.broadcast([a, b])
    left, right = [f"a{d}" for d in range(len(a) - 1)], [f"b{d}" for d in range(len(b) - 1)]
    operands = [Operand(call.arg("self"), a, (*left, "k")), Operand(call.arg("other"), b, (*right, "k"))]
    return contract(call, operands, (*left, *right))


@rule("aten::linalg_vecdot")
def vector_product(call: Call) -> Dims:
    dims = call.broadcast([call.dims("x"), call.dims("y")])
    along = call.position("dim", len(dims))
    call.sums(dims[along])
    return (*dims[:along], *dims[along + 1 :])


@rule("aten::linalg_multi_dot", "aten::chain_matmul")
def chain(call: Call) -> Dims:
    """Multiply matrices one after the other; the first and the last may be vectors."""
    nodes = list(call.arg("tensors" if "tensors" in call.names() else "matrices"))
    operands = []
    for index, node in enumerate(nodes):
        dims = call.dims_of(node)
        labels = (f"m{index}", f"m{index + 1}")
        operands.append(
            Operand(node, dims, labels if len(dims) == _MATRIX else labels[1:] if index == 0 else labels[:1])
        )
    ends = [label for label in ("m0", f"m{len(nodes)}") if any(label in op.labels for op in operands)]
    return contract(call, operands, ends)


@rule("aten::addr")
def add_outer(call: Call) -> Dims:
    """Add the products of all pairs of two vectors."""
    a, b = call.dims("vec1"), call.dims("vec2")
    operands = [Operand(call.arg("vec1"), a, ("m",)), Operand(call.arg("vec2"), b, ("n",))]
    return call.broadcast([contract(call, operands, ("m", "n")), call.dims("self")])


@rule("aten::kron")
def kronecker(call: Call) -> Dims:
    """Each dimension is (position in the first x position in the second)."""
    a, b = call.dims("self"), call.dims("other")
    rank = max(len(a), len(b))
    padded: list[list[Layout | None]] = [[None] * (rank - len(dims)) + list(dims) for dims in (a, b)]
    return tuple(product([layout for layout in pair if layout is not None]) for pair in zip(*padded, strict=True))


@rule("aten::diag", "aten::diagflat", "aten::linalg_diagonal", "aten::trace", "aten::vander", "aten::linalg_vander")
def of_a_diagonal(call: Call) -> Dims:
    for dims in call.tensors():
        call.freeze(dims, "a diagonal is taken or filled")
    return call.axes(call.shape(), call.because("a diagonal is taken or filled"))


@rule("aten::cross", "aten::linalg_cross")
def cross(call: Call) -> Dims:
    """Mix the three positions of one dimension."""
    dims = call.broadcast(call.tensors())
    if call.arg("dim") is None:
        call.freeze(dims, "three positions are mixed")
    else:
        call.freeze(dims[call.position("dim", len(dims))], "three positions are mixed")
    return dims
