"""Operators that mix all positions of some dimensions: those must be whole, the others pass through."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graphopt.axes.proof.step import MaskedStep, masked_rule, tensor_result
from graphopt.axes.proof.value import Dead, Value, broadcast, compact, spread
from graphopt.ir.torch_internals import pytree

_TRANSFORMS = [
    f"aten::fft_{kind}{rank}" for kind in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft") for rank in ("", "2", "n")
]


@masked_rule(*_TRANSFORMS, "aten::fft_fftshift", "aten::fft_ifftshift")
def fourier(step: MaskedStep) -> Value:
    x = step.first()
    rank = x.tensor.dim()
    dims = step.dims("dim", rank)
    if step["dim"] is None and step.arguments.get("s") is not None:
        dims = list(range(rank))[-len(step["s"]) :]
    step.require_whole([x.dead[d] for d in dims], "a dimension that is transformed")
    return Value(tensor_result(step.run()), x.dead)


@masked_rule("aten::stft", "aten::istft")
def short_time_fourier(step: MaskedStep) -> Value:
    x = step.first()
    step.require_whole([flags for value in step.values() for flags in value.dead[value is x :]], "time")
    result = tensor_result(step.run())
    return Value(result, (x.dead[0], *(None for _ in result.shape[1:])))


@masked_rule("aten::diff", "aten::trapezoid", "aten::trapz", "aten::cumulative_trapezoid")
def along_one(step: MaskedStep) -> Value:
    x, *others = step.values()
    dim = step.dim("dim", x.tensor.dim())
    step.require_whole([x.dead[dim], *(flags for value in others for flags in value.dead)], "an ordered dimension")
    result = tensor_result(step.run())
    return Value(result, x.dead if result.dim() == len(x.dead) else (*x.dead[:dim], *x.dead[dim + 1 :]))


@masked_rule("aten::msort")
def sort_first(step: MaskedStep) -> Value:
    x = step.first()
    step.require_whole(x.dead[:1], "an ordered dimension")
    return Value(tensor_result(step.run()), x.dead)


@masked_rule("aten::cross", "aten::linalg_cross")
def cross(step: MaskedStep) -> Value:
    dead = broadcast(value.dead for value in step.values())
    step.require_whole(dead if step["dim"] is None else [dead[step.dim("dim", len(dead))]], "the three coordinates")
    return Value(tensor_result(step.run()), dead)


_OF_MATRICES = [
    f"aten::{name}"
    for name in (
        "_linalg_det", "_linalg_eigh", "_linalg_slogdet", "_linalg_solve_ex", "_linalg_svd", "cholesky",
        "cholesky_inverse", "cholesky_solve", "det", "geqrf", "inverse", "linalg_cholesky", "linalg_cholesky_ex",
        "linalg_cond", "linalg_det", "linalg_eig", "linalg_eigh", "linalg_eigvals", "linalg_eigvalsh", "linalg_inv",
        "linalg_inv_ex", "linalg_ldl_factor", "linalg_ldl_factor_ex", "linalg_lu", "linalg_lu_factor",
        "linalg_lu_factor_ex", "linalg_matrix_exp", "linalg_matrix_norm", "linalg_matrix_power", "linalg_matrix_rank",
        "linalg_pinv", "linalg_qr", "linalg_slogdet", "linalg_solve", "linalg_solve_ex", "linalg_solve_triangular",
        "linalg_svd", "linalg_svdvals", "logdet", "matrix_exp", "matrix_power", "pinverse", "qr", "slogdet", "svd",
        "triangular_solve",
    )
]  # fmt: skip


@masked_rule(*_OF_MATRICES)
def of_matrices(step: MaskedStep) -> Any:
    """Treat each matrix of a batch by itself."""
    values = step.values()
    step.require_whole([flags for value in values for flags in value.dead[-2:]], "rows and columns of a matrix")
    batch = broadcast(value.dead[:-2] for value in values)

    def own(value: Value) -> Dead:
        lead = batch[len(batch) - value.tensor.dim() + 2 :]
        return tuple(flags if value.tensor.size(d) > 1 else None for d, flags in enumerate(lead))

    shorter = {n: compact(v.tensor, own(v)) for n, v in step.arguments.items() if isinstance(v, Value)}
    result = step.run(**shorter)
    return pytree.tree_map_only(
        Tensor, lambda t: Value(spread(t, batch), (*batch, *(None for _ in range(t.dim() - len(batch))))), result
    )
