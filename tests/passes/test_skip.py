"""`skip` of every pass: what names nothing is a mistake of the user's, and the message lists what there is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from graphopt.backends.onnxruntime import OnnxRuntimeBackend
from graphopt.backends.tensorrt import TensorRTBackend
from graphopt.capturing.capture import capture
from graphopt.errors import UsageError
from graphopt.passes.pruning.regularisers import GroupLasso
from graphopt.pipeline.context import Context
from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.plan import Plan
from graphopt.pipeline.registry import PassRegistry
from graphopt.pipeline.runner import run
from graphopt.testing import TensorSamples


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3, padding=1), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        return self.head((x + self.body(x)).mean((2, 3)))


PASSES = {
    "prune": "stem:width",
    "svd:rank=4": "head.weight",
    "sparsity24:ends=yes": "stem.weight, body.weight, head.weight",
    "drop_blocks:criterion=last": "body:convolution",
    "int8": "stem, body, head",
    "weights": "head",
    "codebook": "stem, body, head",
    "half": "stem, body, head",
}


def plan(passes: str, model: nn.Module | None = None) -> list[str]:
    return [refusal.reason for made in plans(passes, model) for refusal in made.refusals]


def plans(passes: str, model: nn.Module | None = None) -> list[Plan]:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    program = capture((model or Net()).eval(), x[:2])
    backend = TensorRTBackend() if "sparsity24" in passes else OnnxRuntimeBackend()
    ctx = Context(original=program, targets=(backend.description,)).with_data(TensorSamples((x,)))
    outcome = run(Pipeline.parse(passes, PassRegistry()), program, ctx)
    return [made for _, made in outcome.plans]


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("wrong", ["layer9*", "haed*"])
def test_a_glob_that_matches_nothing_is_refused_with_what_there_is(pass_: str, wrong: str) -> None:
    with pytest.raises(UsageError, match=rf"`skip={wrong[:-1]}\*` matches no .* of this model\.") as info:
        plan(f"{pass_}:skip={wrong}")
    assert f"There are: {PASSES[pass_]}" in str(info.value)


def test_what_is_near_is_named() -> None:
    with pytest.raises(UsageError, match=r"Did you mean `head\.weight`\?"):
        plan("svd:rank=4:skip=haed.weight")


@pytest.mark.parametrize("pass_", PASSES)
def test_what_stays_anyway_may_be_named(pass_: str) -> None:
    plan(f"{pass_}:skip=stem*") if pass_ != "drop_blocks:criterion=last" else plan(f"{pass_}:skip=body*")


class Nested(nn.Module):
    """A block with an activation of its own, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 32, 3), nn.Linear(32, 32)
        self.block = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Sequential(nn.Conv2d(32, 32, 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        return self.head(torch.sigmoid(x + self.block(x)).mean((2, 3)))


@pytest.mark.parametrize(
    "pass_",
    [
        "prune:ratio=0.5:round_to=1",
        "svd:rank=4",
        "sparsity24:ends=yes",
        "sparsify",
        "int8",
        "weights",
        "codebook",
        "half",
    ],
)
def test_a_module_is_all_that_is_in_it(pass_: str) -> None:
    of_block, of_all_in_it = (plans(f"{pass_}:skip={glob}", Nested())[-1] for glob in ("block", "block*"))
    without = plans(pass_, Nested())[-1]
    assert of_block.sites == of_all_in_it.sites
    assert of_block.sites != without.sites or pass_ in ("svd:rank=4", "weights")  # convolutions are not for these


@pytest.mark.parametrize("make", [GroupLasso])
def test_every_glob_of_a_regulariser_must_name_something(make: Callable[..., object]) -> None:
    program = capture(Net().eval(), torch.randn(2, 3, 8, 8))
    with pytest.raises(UsageError, match=r"`only=layer9` matches no group"):
        make(program, only=("stem*", "layer9"))


class Normed(nn.Module):
    """A convolution and its norm, and a product that falls away."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Dropout()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.norm(self.conv(x))).relu().mean((2, 3))


@pytest.mark.parametrize("pass_", ["int8", "half", "mixed:forms=int8"])
@pytest.mark.parametrize(
    ("glob", "said"),
    [
        ("norm", "names `norm`, which was folded into `conv`. Write `skip=conv`, which leaves that as it is"),
        ("dropout", "names `drop`, which passes before this one folded away or removed"),
    ],
    ids=["into a layer", "away"],
)
def test_what_was_folded_is_named_by_what_it_was_folded_into(pass_: str, glob: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"`skip={glob}` {said}"):
        plan(f"fold,{pass_}:skip={glob}", Normed())
    plan(f"fold,{pass_}:skip=conv", Normed())
