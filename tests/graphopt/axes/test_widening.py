"""Growing axes: what a model computes stays, and what would not stay is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from graphopt.axes.infer import infer
from graphopt.axes.proof.randomise import randomise
from graphopt.axes.widening import Growing, widen
from graphopt.capturing.capture import capture
from graphopt.errors import PassError
from graphopt.ir.program import Program
from tests import models
from tests.models import EXAMPLES, example


class ShuffledBottleneck(nn.Module):
    """Depthwise convolutions between what mobile networks put around them: gate, skip, concatenation, shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand, self.norm = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 10, 1), nn.BatchNorm2d(10)
        self.depthwise = nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.squeeze, self.excite, self.project = nn.Conv2d(10, 4, 1), nn.Conv2d(4, 10, 1), nn.Conv2d(10, 8, 1)
        self.cheap, self.right = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 6, 1)
        self.slopes, self.head = nn.PReLU(6), nn.Linear(14 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        y = F.hardswish(self.depthwise(F.relu(self.norm(self.expand(x)))))
        x = x + self.project(y * F.hardsigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True))))))
        x = torch.cat([x, self.cheap(x)], 1)
        b, c, h, w = x.shape
        left, right = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w).chunk(2, 1)
        x = F.adaptive_avg_pool2d(torch.cat([left, self.slopes(self.right(right))], 1), 2)
        return self.head(x.flatten(1))


def randomised(program: Program) -> fx.GraphModule:
    gm = randomise(program, torch.Generator().manual_seed(0))
    for name, _ in program.graph_module.named_parameters():
        path, _, leaf = name.rpartition(".")
        owner = gm.get_submodule(path)
        drawn = owner._buffers.pop(leaf)
        owner.register_parameter(leaf, nn.Parameter(drawn))
    return gm


def check_exact(gm: fx.GraphModule, x: Tensor) -> tuple[list[str], set[str]]:
    """Give every group that may grow another number of channels; return those, and why the others may not."""
    axes = infer(gm)
    whys = {group: Growing(axes).why_not(group) for group in axes.groups()}
    assert whys
    sizes = {group.name: group.size + 1 + place % 4 for place, (group, why) in enumerate(whys.items()) if why is None}
    result = widen(gm, axes, sizes, "test")
    found = {group.name: group.size for group in infer(result).groups()}
    assert {name: found[name] for name in sizes} == sizes
    assert (gm(x) - result(x)).norm() <= 1e-12 * gm(x).norm()
    return list(sizes), {why.partition(" at `")[0] for why in whys.values() if why is not None}


# By model how many groups may grow, and what holds the others.
GROWING: dict[type[nn.Module], tuple[int, set[str]]] = {
    models.Residual: (2, set()),
    models.Depthwise: (3, set()),
    models.GroupedShuffle: (5, set()),
    models.Dense: (3, set()),
    models.UNet: (4, set()),
    models.OptionA: (1, set()),
    models.FusedAttention: (0, {"layer_norm", "scaled_dot_product_attention"}),
    models.SplitAttention: (0, {"bmm", "matmul", "no weight sums over it"}),
    models.GroupedQuery: (1, {"embedding", "scaled_dot_product_attention", "no weight sums over it"}),
    models.TiedWeights: (1, {"`head.weight` is read more than once"}),
    models.Mixer: (2, {"layer_norm"}),
    models.GroupNormed: (0, {"group_norm"}),
    models.WeightNormed: (0, {"matmul", "_weight_norm"}),
    models.WritesThroughViews: (0, {"copy_"}),
    models.Recurrent: (0, {"lstm"}),
}


# NeighbourGate mixes all its channels: it has no groups.
@pytest.mark.parametrize(
    "kind", [kind for kind in EXAMPLES if kind is not models.NeighbourGate], ids=lambda kind: kind.__name__
)
def test_wider_models_compute_the_same(kind: type[nn.Module]) -> None:
    names, why = check_exact(randomised(models.captured(kind)), example(kind))
    assert (len(names), why) == GROWING[kind]


def test_a_shuffled_bottleneck_computes_the_same() -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    names, _ = check_exact(randomised(capture(ShuffledBottleneck().double(), (x,))), x)
    assert {"expand:width", "squeeze:channels", "right:channels"} < set(names)


@pytest.mark.parametrize(
    ("across", "why"),
    [
        (lambda x: x * x.mean(1, keepdim=True), "mean at `mean` may compute across it"),
        (lambda x: x.softmax(1), "softmax at `softmax` may compute across it"),
        (lambda x: x.cumsum(1), "cumsum at `cumsum` may compute across it"),
        (lambda x: F.batch_norm(x, None, None, training=True), "batch_norm at `batch_norm` may compute across it"),
    ],
)
def test_what_computes_across_channels_holds_them(across: Callable[[Tensor], Tensor], why: str) -> None:
    class Across(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(across(self.first(x)))

    gm = capture(Across(), (torch.randn(2, 3, 4, 4),)).graph_module
    axes = infer(gm)
    (group,) = axes.groups()
    assert Growing(axes).why_not(group) == why
    with pytest.raises(PassError, match="cannot have 8 channels in place of 4"):
        widen(gm, axes, {group.name: 8}, "test")


def test_a_group_neither_shrinks_nor_is_made_up() -> None:
    gm = models.captured(models.Residual).graph_module
    axes = infer(gm)
    with pytest.raises(PassError, match="cannot have 7 channels in place of 8: 7 are fewer"):
        widen(gm, axes, {"stem:width": 7}, "test")
    with pytest.raises(PassError, match="no group `stem` to widen"):
        widen(gm, axes, {"stem": 9}, "test")
