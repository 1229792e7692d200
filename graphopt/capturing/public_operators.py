"""What core ATen makes of public operators, and trusts its arguments, becomes the public one again, which checks them.

_fft_r2c(x, dims, 0, True)      fft_rfftn(x, None, dims, "backward")
_fft_r2c(x, dims, 0, False)     fft_fftn(x, None, dims, "backward")
_fft_c2r(x, dims, 2, n)         fft_irfftn(x, [-1, .., n], dims, "backward")
_fft_c2c(x, dims, 2, False)     fft_ifftn(x, None, dims, "backward")
_pdist_forward(x, p)            pdist(x, p)
upsample_nearest1d(x, [8], 2.)  upsample_nearest1d.vec(x, None, [2.])

`_fft_c2c` along an axis that is not there reads memory of others, and so does an upsampling by a scale that does not
lead to its size (torch 2.13). A size that comes with scales is left to them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphopt.errors import CaptureError
from graphopt.ir.graph import arguments, erase_dead
from graphopt.ir.regions import every_graph_module
from graphopt.ir.torch_internals import OpOverloadPacket

aten = torch.ops.aten

# What the number says that divides a transform: 0 nothing, 1 the root of the number of its elements, 2 that number.
_FORWARD = ("backward", "ortho", "forward")
_INVERSE = ("forward", "ortho", "backward")


_UPSAMPLINGS = (
    *("upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
    *(f"{prefix}{rank}d" for prefix in ("upsample_nearest", "_upsample_nearest_exact") for rank in (1, 2, 3)),
)


def use_public_operators(gm: fx.GraphModule) -> None:
    """Replace the calls, in place, in the bodies of regions too.

    Raises:
        CaptureError: a call has arguments that no public operator leads to.
    """
    for body in every_graph_module(gm):
        for node in list(body.graph.nodes):
            public = _PUBLIC.get(node.target)
            if public is not None:
                given = arguments(node, ())
                if "dim" in given and not isinstance(given["dim"], list | tuple):
                    raise CaptureError(f"The model transforms along `{given['dim']}`, which is no list of axes.")
                node.target, *args = public(given)
                node.args, node.kwargs = tuple(args), {}
        erase_dead(body.graph)  # sizes that nothing else read
        body.recompile()


def _real_to_complex(given: dict[str, Any]) -> tuple[Any, ...]:
    operator = aten.fft_rfftn.default if given["onesided"] else aten.fft_fftn.default
    return (operator, given["self"], None, given["dim"], _norm(_FORWARD, given))


def _complex_to_real(given: dict[str, Any]) -> tuple[Any, ...]:
    sizes = [*[-1] * (len(given["dim"]) - 1), given["last_dim_size"]]
    return (aten.fft_irfftn.default, given["self"], sizes, given["dim"], _norm(_INVERSE, given))


def _complex_to_complex(given: dict[str, Any]) -> tuple[Any, ...]:
    operator, norms = (aten.fft_fftn, _FORWARD) if given["forward"] else (aten.fft_ifftn, _INVERSE)
    return (operator.default, given["self"], None, given["dim"], _norm(norms, given))


def _distances(given: dict[str, Any]) -> tuple[Any, ...]:
    return (aten.pdist.default, given["self"], given["p"])


def _upsampled(operator: OpOverloadPacket[..., Any], given: dict[str, Any]) -> tuple[Any, ...]:
    aligned = [given["align_corners"]] if "align_corners" in given else []
    scales = [value for name, value in given.items() if name.startswith("scales")]
    if None not in scales:
        return (operator.vec, given["self"], None, *aligned, scales)
    if any(scale is not None for scale in scales):
        raise CaptureError(f"The model calls `{operator}` with scales for some of its axes: give it all or none.")
    return (operator.vec, given["self"], given["output_size"], *aligned, None)


def _norm(names: tuple[str, ...], given: dict[str, Any]) -> str:
    for number, name in enumerate(names):
        if given["normalization"] == number:
            return name
    raise CaptureError(
        f"The model scales a Fourier transform by rule {given['normalization']!r}; there are rules 0, 1 and 2."
    )


_PUBLIC: dict[Any, Callable[[dict[str, Any]], tuple[Any, ...]]] = {
    aten._fft_r2c.default: _real_to_complex,
    aten._fft_c2r.default: _complex_to_real,
    aten._fft_c2c.default: _complex_to_complex,
    aten._pdist_forward.default: _distances,
    **{getattr(aten, name).default: functools.partial(_upsampled, getattr(aten, name)) for name in _UPSAMPLINGS},
}
