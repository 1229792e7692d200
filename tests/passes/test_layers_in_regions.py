"""What passes that work layer by layer say of layers inside a region, where they do not reach."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphopt.capturing.capture import capture
from graphopt.ir.program import Program
from graphopt.job.optimizing import optimize


class Branching(nn.Module):
    """A layer that always runs, and two of which one does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.cond(x.mean() > 0, self.left, self.right, (self.first(x).relu(),))
        return result


@pytest.fixture(scope="module")
def branching() -> Program:
    torch.manual_seed(0)
    return capture(Branching(), torch.randn(2, 64))


@pytest.mark.parametrize(
    "text", ["svd:rank=16", "int8", "weights", "codebook", "sparsity24:ends=yes", "prune:ratio=0.5"]
)
def test_layers_inside_a_region_are_named(branching: Program, text: str) -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(64, 64, generator=generator)
    target = "tensorrt" if "24" in text else "onnxruntime"
    result = optimize(branching, data=data, passes=text, target=target, lower=False)
    assert result.plans[-1].sites
    said = {refusal.site: refusal.reason for refusal in result.plans[-1].refusals}
    assert "its layers run inside a region" in said["cond"]


class Residual(nn.Module):
    """A region is a residual branch, after one that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.plain(x).relu()
        result: Tensor = h + torch.cond(x.mean() > 0, self.left, self.right, (h,))
        return result


def test_a_branch_that_is_a_region_can_be_dropped() -> None:
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(4, 8)
    result = optimize(model, data=torch.randn(64, 8), passes="drop_blocks:blocks=1:criterion=last", target=None)
    assert result.plans[-1].sites == ("getitem:mlp",)
    assert torch.allclose(result.program(x), x + model.plain(x).relu())
    assert "left.weight" not in result.program.state_dict()
