"""A frozen weight stays frozen through every pass, and what is not frozen stays trained."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.capturing.capture import capture
from graphopt.ir.program import Program
from graphopt.pipeline.registry import PassRegistry

PIPELINES = {
    "bfloat16": "bfloat16",
    "codebook": "codebook:bits=2",
    "distill_hooks": "distill_hooks",
    "drop_blocks": "drop_blocks:blocks=1",
    "equalize": "equalize:gain=0",
    "fold": "fold",
    "half": "half:compute=yes",
    "int8": "int8",
    "mixed": "mixed:forms=weights4+int8:min_sqnr=10",
    "prune": "prune:ratio=0.5:round_to=1",
    "qat": "weights:block=16:skip=head.2,qat:epochs=1",
    "recover": "prune:ratio=0.5:round_to=1,recover:epochs=1",
    "sparsify": "sparsify",
    "sparsity24": "sparsity24:force=yes",
    "svd": "svd:ratio=0.3",
    "weights": "weights",
}


def target(passes: str) -> str:
    return "tensorrt" if passes == "bfloat16" else "onnxruntime"


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


class Net(nn.Module):
    """A backbone and a head; the head holds a weight that is computed from parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), Block(), Block())
        self.head = nn.Sequential(
            nn.Linear(16, 64),
            nn.ReLU(),
            nn.Linear(64, 64),
            nn.ReLU(),
            nn.utils.parametrizations.weight_norm(nn.Linear(64, 5)),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.backbone(x).mean((2, 3)))
        return y


@functools.cache
def net(*, backbone: bool, head: bool) -> Program:
    torch.manual_seed(0)
    model = Net()
    model.backbone.requires_grad_(backbone)
    model.head.requires_grad_(head)
    return capture(model, torch.randn(4, 3, 8, 8))


def test_every_pass_is_tried() -> None:
    assert set(PIPELINES) == set(PassRegistry().names())


@pytest.mark.parametrize("passes", [*PIPELINES.values(), "fold,svd:ratio=0.3,prune:ratio=0.3:round_to=1,int8"])
def test_a_frozen_backbone_stays_frozen_and_the_head_trained(passes: str) -> None:
    data = torch.randn(32, 3, 8, 8)
    result = graphopt.optimize(net(backbone=False, head=True), data, passes, target(passes), lower=False, bench=False)
    assert any(plan.sites for plan in result.plans)
    trained = {name: parameter.requires_grad for name, parameter in result.program.graph_module.named_parameters()}
    assert not [name for name, value in trained.items() if value and "backbone" in name]
    heads = {name: value for name, value in trained.items() if "head" in name}
    assert all(heads.values())
    assert heads or "int8" in passes


@pytest.mark.parametrize("passes", PIPELINES.values())
def test_nothing_frozen_becomes_trained_under_any_name(passes: str) -> None:
    data = torch.randn(32, 3, 8, 8)
    program = net(backbone=False, head=False)
    frozen = graphopt.optimize(program, data, passes, target(passes), lower=False, bench=False).program
    assert not [name for name, one in frozen.graph_module.named_parameters() if one.requires_grad]


def test_recovery_leaves_the_values_of_frozen_weights() -> None:
    data = torch.randn(32, 3, 8, 8)
    program = net(backbone=False, head=True)
    pruned = graphopt.optimize(program, data, "prune:ratio=0.5:round_to=1", None, bench=False).program
    recovered = graphopt.optimize(pruned, data, "recover:epochs=1", None, bench=False).program
    before, after = dict(pruned.graph_module.named_parameters()), dict(recovered.graph_module.named_parameters())
    assert all(torch.equal(after[name], one) for name, one in before.items() if not one.requires_grad)
