"""Why a layer has no stored weight: what is said can be followed, and is true after it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphopt.backends.onnxruntime.description import DESCRIPTION as ONNXRUNTIME
from graphopt.backends.tensorrt.description import DESCRIPTION as TENSORRT
from graphopt.capturing.capture import capture
from graphopt.ir.program import Program
from graphopt.passes.fold import Fold
from graphopt.passes.int8 import Int8, Int8Options
from graphopt.passes.sparsity24 import Sparsity24
from graphopt.passes.svd import Svd, SvdOptions
from graphopt.pipeline.context import Context
from graphopt.testing import TensorSamples, run_pass

TARGETS = {"svd": ONNXRUNTIME, "int8": ONNXRUNTIME, "sparsity24": TENSORRT}
X = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
ADVICE = "put fold before, which stores it"


class Reused(nn.Module):
    """A layer whose weight is a function of that of another one."""

    def __init__(self, made: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.made = nn.Linear(16, 16), made

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.first(x).relu(), self.made(self.first.weight))


class Stacked(nn.Module):
    """Layers whose weights are one tensor, and one whose weight is a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.rest = nn.Parameter(torch.randn(2, 16, 16) * 0.3), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(2):
            x = (x @ self.weights[i]).relu()
        return self.rest(x)


def reasons(program: Program, which: str) -> dict[str, str]:
    ctx = Context(original=program, target=TARGETS[which], samples=TensorSamples((X,)))
    if which == "svd":
        plan = Svd(SvdOptions(rank=4, round_to=1)).plan(program, ctx)
    elif which == "int8":
        plan = Int8(Int8Options()).plan(program, ctx)
    else:
        plan = Sparsity24().plan(program, ctx)
    return {refusal.site: refusal.reason for refusal in plan.refusals}


@pytest.mark.parametrize("which", ["svd", "int8", "sparsity24"])
def test_a_tied_weight_that_is_read_transposed_is_shared_before_and_after_fold(which: str) -> None:
    program = capture(Reused(lambda weight: weight.t()), X[:2])
    expected = "its weight is computed from stored tensors by `t`, and what it is computed from is shared with `linear`"
    for one in (program, run_pass(Fold(), program, ())):
        assert reasons(one, which)["linear_1"] == expected


def test_what_fold_stores_is_said_to_be_and_is() -> None:
    program = capture(Reused(lambda weight: weight.softmax(-1)), X[:2])
    for which in ("svd", "int8"):
        assert reasons(program, which)["linear_1"].endswith(ADVICE)
        assert "linear_1" not in reasons(run_pass(Fold(), program, ()), which)


def test_products_with_a_part_of_a_stored_tensor_are_named() -> None:
    program = capture(Stacked(), X[:2])
    found = reasons(program, "svd")
    assert set(found) == {"matmul", "matmul_1"}
    assert found["matmul"] == f"its weight is computed from stored tensors by `select`: {ADVICE}"
    assert reasons(run_pass(Fold(), program, ()), "svd") == {}


def test_what_fold_finds_too_large_is_not_advised() -> None:
    program = capture(Reused(lambda weight: weight.repeat(3000, 1) * 2), X[:2])
    found = reasons(program, "svd")["linear_1"]
    assert "put fold before" not in found
    assert "it is constant, but" in found
