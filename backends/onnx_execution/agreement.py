"""When two arrays computed in floating point count as equal, and what they may differ by.

1. Quickly: at most half of the digits of the type are lost, relative to the largest output.
2. Where that fails (deep networks amplify rounding), both are compared with a float64 run: the runtime may be a few
   times further from it than torch itself, since it only sums in another order.
3. That the float64 run is another for the sake of rounding is not believed: where the last digits of all that is
   computed are shaken, torch's own outputs must move as far. They do not where float32 overflows, nor where a line
   writes to memory that it reads, which happens in another order in every type.
4. Integers and booleans must be equal. An argmax between two values that rounding puts in either order is no error:
   elements that change in torch, too, under float64 (3. holds here as well) or a rounding of the inputs and of what is
   dequantized (whose values are often equal) are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

Tensors = tuple[torch.Tensor, ...]

# Errors of sums in two orders are draws from one distribution; the largest of many elements varies by less than this.
WORSE_THAN_TORCH = 8.0
_PERTURBED_RUNS = 8  # of two equal values, either comes first in half of them
_SHAKEN_RUNS = 4


@dataclass(frozen=True)
class Reference:
    """The program, run in the ways a comparison may need; each run happens at most once and only if asked for.

    Attributes:
        wanted: its outputs.
        exact: runs it in float64.
        perturbed: runs it on inputs that are changed in their last digits, by a seed.
        shaken: does, and changes the last digits of all that is computed, too.
    """

    wanted: Tensors
    exact: Callable[[], Tensors]
    perturbed: Callable[[int], Tensors]
    shaken: Callable[[int], Tensors]


@dataclass(frozen=True, slots=True)
class Disagreement:
    """An output that is wrong."""

    output: int
    text: str


def half_of_the_digits(dtype: torch.dtype) -> float:
    """Return the relative error at which a floating type has half of its digits left: 3.5e-4 for float32."""
    return math.sqrt(torch.finfo(dtype).eps)


def relative_error(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Return the largest difference over the largest finite wanted magnitude; inf where only one of them is finite."""
    if wanted.numel() == 0:
        return 0.0
    want, got = wanted.double(), found.double()
    finite = torch.isfinite(want)
    if not torch.equal(torch.isnan(want), torch.isnan(got)):
        return math.inf
    same_infinities = torch.equal(want[~finite].nan_to_num(0.0), got[~finite].nan_to_num(0.0))
    if not same_infinities or not bool(torch.isfinite(got[finite]).all()):
        return math.inf
    if not bool(finite.any()):
        return 0.0
    error = float((want[finite] - got[finite]).abs().max())
    scale = float(want[finite].abs().max())
    return error / scale if scale else (0.0 if error == 0 else math.inf)


def disagreements(reference: Reference, found: Tensors) -> list[Disagreement]:
    """List the outputs that differ by more than floating-point arithmetic explains."""
    wrong = []
    for index, (want, got) in enumerate(zip(reference.wanted, found, strict=True)):
        if want.shape != got.shape or want.dtype != got.dtype:
            text = f"is {_described(got)}, expected {_described(want)}"
        elif want.is_floating_point():
            text = _float_disagreement(reference, index, want, got)
        else:
            text = _exact_disagreement(reference, index, want, got)
        if text:
            wrong.append(Disagreement(index, text))
    return wrong


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {'x'.join(map(str, tensor.shape)) or '()'}"


def _float_disagreement(reference: Reference, index: int, want: torch.Tensor, got: torch.Tensor) -> str:
    error = relative_error(want, got)
    if error <= half_of_the_digits(want.dtype):
        return ""
    exact = reference.exact()[index]
    own, found = relative_error(exact, want), relative_error(exact, got)
    allowed = WORSE_THAN_TORCH * own
    if found <= allowed:
        moved = (relative_error(want, reference.shaken(seed)[index]) for seed in range(_SHAKEN_RUNS))
        if any(found <= max(WORSE_THAN_TORCH * error, half_of_the_digits(want.dtype)) for error in moved):
            return ""
        return (
            f"is off by {found:.3g} of its largest value, and the program itself by {own:.3g} from what it computes in "
            "double precision, neither of which rounding explains: does it overflow, or write to memory that it reads "
            "(`x[1:] = x[:-1]`)"
        )
    return f"is off by {found:.3g} of its largest value, where float arithmetic explains {allowed:.3g}"


def _exact_disagreement(reference: Reference, index: int, want: torch.Tensor, got: torch.Tensor) -> str:
    differing = want != got
    if not bool(differing.any()):
        return ""
    for seed in range(_PERTURBED_RUNS):
        differing &= reference.perturbed(seed)[index] == want
    unsure = differing & (reference.exact()[index] != want) if bool(differing.any()) else differing
    for seed in range(_SHAKEN_RUNS if bool(unsure.any()) else 0):
        differing &= ~unsure | (reference.shaken(seed)[index] == want)
    count = int(differing.sum())
    return f"has {count} of {want.numel()} wrong entries" if count else ""
