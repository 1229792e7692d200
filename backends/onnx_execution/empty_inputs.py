"""What an artifact makes of nothing: silence, padding, a black image, which verified samples seldom are.

There a norm or a sum is 0, and what keeps a program from dividing by it or taking its logarithm is a tiny number that a
runtime may round away.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from graphopt.backends.onnx_execution.replay import takes
from graphopt.backends.onnx_execution.session import OnnxSession
from graphopt.errors import LoweringError
from graphopt.ir.program import Program
from graphopt.ir.regions import graph_modules
from graphopt.targets.backend import Array


def check_on_zeros(session: OnnxSession, program: Program, arrays: Sequence[Array], name: str) -> None:
    """Compare where outputs are numbers, with zeros for floats and no flag set; integers, which may be places, stay.

    Args:
        session: the artifact.
        program: what it must compute.
        arrays: inputs that both take.
        name: of the artifact.

    Raises:
        LoweringError: an output is NaN or infinite where the program's is not.
    """
    if len([*graph_modules(program.graph_module)]) > 1:
        return  # a loop may end on some numbers alone
    empty = [array if np.issubdtype(array.dtype, np.integer) else np.zeros_like(array) for array in arrays]
    try:
        found = session(*empty)
    except LoweringError:  # neither does the program take it, or it is not for such inputs
        return
    if all(np.isfinite(array).all() for array in found if np.issubdtype(array.dtype, np.inexact)):
        return
    if not takes(program, empty):  # it asserts something else, say
        return
    with torch.no_grad():
        wanted = program.call_flat(tuple(map(torch.from_numpy, empty)))
    for spec, want, array in zip(program.outputs, wanted, found, strict=True):
        if want.is_floating_point() and bool((want.isfinite() & ~torch.from_numpy(array).isfinite()).any()):
            raise LoweringError(
                f"{name} computes something else than the program: where inputs are zeros, output `{spec.name}` is NaN "
                "or infinite, and the program's is not. Does it divide by, or take the logarithm of, what is nearly 0? "
                "Please report the model."
            )
