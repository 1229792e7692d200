"""Operators that mix the positions of named dimensions with each other: those stay whole, the others pass."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.axes.call import Call
from graphopt.axes.layout import Dims, Size
from graphopt.axes.registry import Result, rule

_REASON = "positions are mixed"


def mixed(call: Call, dims: Dims, along: Sequence[int], reason: str = _REASON) -> Result:
    """Keep some dimensions whole and let the others pass to every result.

    A result has the operand's rank, the dimensions at their new sizes, or lacks them.
    """
    call.freeze([dims[d] for d in along], reason)
    value = call.node.meta["val"]
    if not isinstance(value, list | tuple):
        return _one(call, dims, along, call.shape(), reason)
    return [_one(call, dims, along, call.shape(index), reason) for index in range(len(value))]


def _one(call: Call, dims: Dims, along: Sequence[int], shape: Sequence[Size], reason: str) -> Dims:
    rest = [layout for d, layout in enumerate(dims) if d not in along]
    if len(shape) == len(dims):
        because = call.because(reason)
        return tuple(call.axis(shape[d], because) if d in along else layout for d, layout in enumerate(dims))
    if len(shape) == len(rest):
        return tuple(rest)
    call.freeze(rest, reason)
    return call.axes(shape, call.because(reason))


@rule(
    "aten::fft_fft",
    "aten::fft_ifft",
    "aten::fft_rfft",
    "aten::fft_irfft",
    "aten::fft_hfft",
    "aten::fft_ihfft",
    "aten::fft_fft2",
    "aten::fft_ifft2",
    "aten::fft_rfft2",
    "aten::fft_irfft2",
    "aten::fft_hfft2",
    "aten::fft_ihfft2",
    "aten::fft_fftn",
    "aten::fft_ifftn",
    "aten::fft_rfftn",
    "aten::fft_irfftn",
    "aten::fft_hfftn",
    "aten::fft_ihfftn",
    "aten::fft_fftshift",
    "aten::fft_ifftshift",
)
def fourier(call: Call) -> Result:
    dims = call.dims("self")
    along = call.positions("dim", len(dims))
    if call.arg("dim") is None and "s" in call.names() and call.arg("s") is not None:
        along = list(range(len(dims)))[-len(call.arg("s")) :]
    return mixed(call, dims, along, "transformed")


@rule("aten::stft", "aten::istft")
def short_time_fourier(call: Call) -> Result:
    """Frames and frequencies come of time; only a batch in front passes."""
    for dims in call.tensors()[1:]:
        call.freeze(dims, "transformed")
    dims, shape = call.dims("self"), call.shape()
    has_batch = len(dims) == (2 if "n_fft" in call.names() and len(shape) > len(dims) else len(dims))
    if not has_batch or not shape or not call.sized(dims[0], shape[0]):
        call.freeze(dims, "transformed")
        return call.axes(shape, call.because("transformed"))
    call.freeze(dims[1:], "transformed")
    return (dims[0], *call.axes(shape[1:], call.because("transformed")))


@rule("aten::diff", "aten::trapezoid", "aten::trapz", "aten::cumulative_trapezoid")
def along_one(call: Call) -> Result:
    """The result at one position depends on others of the dimension and on their order."""
    first, *others = call.tensors()
    for dims in others:
        call.freeze(dims, "the order of positions matters")
        if len(dims) == len(first) and call.names()[0] != "y":
            call.freeze(first, "the order of positions matters")
    if others:
        call.freeze(first, "the order of positions matters")
    return mixed(call, first, [call.position("dim", len(first))] if first else [], "the order of positions matters")


@rule("aten::msort")
def sort_first(call: Call) -> Result:
    return mixed(call, call.dims("self"), [0], "the order of positions matters")


@rule(
    "aten::gradient",
    "aten::fliplr",
    "aten::flipud",
    "aten::rot90",
    "aten::histc",
    "aten::quantile",
    "aten::renorm",
    "aten::nanquantile",
)
def everywhere(call: Call) -> Result:
    """Mix more than is worth telling apart."""
    for dims in call.everything():
        call.freeze(dims, "the order of positions matters")
    value, because = call.node.meta["val"], call.because("the order of positions matters")
    if isinstance(value, list | tuple):
        return [call.axes(call.shape(index), because) for index in range(len(value))]
    return call.axes(call.shape(), because)


@rule("aten::affine_grid_generator")
def affine_grid(call: Call) -> Dims:
    """Theta (batch, rows, columns) makes places (batch, height, width, rows)."""
    theta = call.dims("theta")
    call.freeze(theta[1:], "coordinates")
    return (theta[0], *call.axes(call.shape()[1:], call.because("coordinates")))
