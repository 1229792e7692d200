"""Parts of operators that core ATen leaves in a program become the operators they are parts of.

_fft_r2c(x, dims, 0, True)      fft_rfftn(x, None, dims, "backward")
_fft_r2c(x, dims, 0, False)     fft_fftn(x, None, dims, "backward")
_fft_c2r(x, dims, 2, n)         fft_irfftn(x, [-1, .., n], dims, "backward")
_fft_c2c(x, dims, 2, False)     fft_ifftn(x, None, dims, "backward")
_pdist_forward(x, p)            pdist(x, p)

The public ones check their arguments and the parts trust them: `_fft_c2c` along an axis that is not there reads memory
of others (torch 2.13).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.errors import CaptureError
from graphopt.ir.graph import arguments

aten = torch.ops.aten

# What the number says that divides a transform: 0 nothing, 1 the root of the number of its elements, 2 that number.
_FORWARD = ("backward", "ortho", "forward")
_INVERSE = ("forward", "ortho", "backward")


def use_public_operators(gm: fx.GraphModule) -> None:
    """Replace the calls of parts, in place, in the bodies of regions too.

    Raises:
        CaptureError: a call has arguments that no public operator would give its part.
    """
    for body in [module for module in gm.modules() if isinstance(module, fx.GraphModule)]:
        for node in list(body.graph.nodes):
            public = _PUBLIC.get(node.target)
            if public is not None:
                node.target, *args = public(arguments(node, ()))
                node.args, node.kwargs = tuple(args), {}
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


def _norm(names: tuple[str, ...], given: dict[str, Any]) -> str:
    for number, name in enumerate(names):
        if given["normalization"] == number:
            return name
    raise CaptureError(
        f"The model scales a Fourier transform by rule {given['normalization']!r}; there are rules 0, 1 and 2."
    )


_PUBLIC = {
    aten._fft_r2c.default: _real_to_complex,
    aten._fft_c2r.default: _complex_to_real,
    aten._fft_c2c.default: _complex_to_complex,
    aten._pdist_forward.default: _distances,
}
