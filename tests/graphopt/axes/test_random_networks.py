"""Random small networks: whatever the inference lets go can go, and the rest computes what it did."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from graphopt.axes.infer import infer
from graphopt.axes.layout import surviving
from graphopt.axes.proof.masked import check_masked_equivalence
from graphopt.axes.rewrite import remove, slices
from graphopt.axes.widening import Growing, widen
from graphopt.capturing.capture import capture
from graphopt.ir.graph import copy_graph_module, tensor_attribute

# Sums of a few hundred float64 products, in another order.
ROUNDING = 1e-10


@dataclass(frozen=True)
class Step:
    """One random layer: what it does and three numbers it may use."""

    kind: str
    a: int
    b: int
    c: int


KINDS = (
    "conv",
    "grouped",
    "depthwise",
    "norm",
    "act",
    "skip",
    "join",
    "swap",
    "shuffle",
    "pad",
    "cut",
    "gate",
    "pixels",
)


class Network(nn.Module):
    """Applies steps to a picture, remembering earlier results to add or join."""

    def __init__(self, steps: list[Step], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.steps = steps
        self.layers = nn.ModuleDict()
        self.widths = [4]
        self._plan(4)
        self.head = nn.Linear(self.widths[-1], 3)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.normal_(module.running_mean)

    def _plan(self, width: int) -> None:
        self.layers["stem"] = nn.Conv2d(2, width, 1)
        for index, step in enumerate(self.steps):
            layer, width = self._layer(step, width)
            if layer is not None:
                self.layers[str(index)] = layer
            self.widths.append(width)

    def _layer(self, step: Step, width: int) -> tuple[nn.Module | None, int]:
        old = self.widths[step.a % len(self.widths)]
        if step.kind == "conv":
            return nn.Conv2d(width, step.b, 1 + 2 * (step.c % 2), padding=step.c % 2), step.b
        if step.kind == "grouped":
            groups = next(g for g in (4, 3, 2, 1) if width % g == 0)
            return nn.Conv2d(width, groups * (1 + step.b % 3), 1, groups=groups), groups * (1 + step.b % 3)
        if step.kind == "depthwise":
            return nn.Conv2d(width, width * (1 + step.b % 2), 3, padding=1, groups=width), width * (1 + step.b % 2)
        if step.kind == "norm":
            return nn.BatchNorm2d(width), width
        if step.kind == "gate":
            return nn.Sequential(nn.Conv2d(width, step.b, 1), nn.ReLU(), nn.Conv2d(step.b, width, 1)), width
        if step.kind == "skip":
            return (nn.Conv2d(old, width, 1, bias=False) if old != width else None), width
        grown = {"join": width + old, "pad": width + 1 + step.b % 2, "cut": max(1, width - step.b % width)}
        if step.kind == "pixels" and width % 4 == 0:
            return None, width // 4
        return None, grown.get(step.kind, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers["stem"](x)
        seen, known = [x], dict(self.layers.items())
        for index, step in enumerate(self.steps):
            x = self._run(step, known.get(str(index)), x, seen)
            seen.append(x)
        return self.head(x.mean((2, 3)))

    def _run(self, step: Step, layer: nn.Module | None, x: Tensor, seen: list[Tensor]) -> Tensor:
        width, old = x.shape[1], seen[step.a % len(seen)]
        if step.kind == "gate":
            return x * layer(F.adaptive_avg_pool2d(x, 1)).sigmoid()  # type: ignore[misc]
        if step.kind == "skip":
            return x + (old if layer is None else layer(old))
        if layer is not None:
            return layer(x)
        if step.kind == "act":
            return (F.relu, torch.tanh, F.silu, lambda y: F.leaky_relu(y + 0.1))[step.a % 4](x)
        if step.kind == "join":
            return torch.cat([old, x] if step.b % 2 else [x, old], 1)
        if step.kind == "swap":
            cut = 1 + step.b % max(1, width - 1)
            return torch.cat([x[:, cut:], x[:, :cut]], 1) if width > 1 else x
        if step.kind == "shuffle":
            groups = next(g for g in (3, 2, 1) if width % g == 0)
            return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)
        if step.kind == "pad":
            return F.pad(x, (0, 0, 0, 0, 1, step.b % 2))
        if step.kind == "cut":
            return x.narrow(1, min(step.b % width, step.c % width), max(1, width - step.b % width))
        if width % 4 == 0:  # pixels
            return F.avg_pool2d(F.pixel_shuffle(x, 2), 2)
        return x


STEPS = st.lists(
    st.builds(Step, st.sampled_from(KINDS), st.integers(0, 6), st.integers(2, 9), st.integers(0, 6)),
    min_size=2,
    max_size=8,
)


@settings(max_examples=15, deadline=None)
@given(STEPS, st.integers(0, 2**16))
def test_what_pruned_and_wider_networks_compute(steps: list[Step], seed: int) -> None:
    x = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gm = capture(Network(steps, seed).double(), (x,)).graph_module
    axes = infer(gm)
    draw = random.Random(seed)
    kept = {g.axis: sorted(draw.sample(range(g.size), draw.randint(1, g.size))) for g in axes.groups()}
    pruned = remove(gm, axes, kept)
    expected = _consumers_zeroed(gm, axes.groups(), kept)(x)
    assert (pruned(x) - expected).norm() <= ROUNDING * expected.norm()
    check_masked_equivalence(gm, pruned, slices(axes, kept), (x,))
    assert pruned(x[:1].expand(3, -1, -1, -1)).shape == (3, 3)
    assert all(Growing(axes).why_not(g) is None for g in axes.groups())
    wide = widen(gm, axes, {g.name: g.size + draw.randint(0, 5) for g in axes.groups()}, "test")
    assert (wide(x) - gm(x)).norm() <= ROUNDING * gm(x).norm()


def _consumers_zeroed(gm: fx.GraphModule, groups: list, kept: dict[int, list[int]]) -> fx.GraphModule:  # type: ignore[type-arg]
    result = copy_graph_module(gm)
    zeroed: dict[str, Tensor] = {}
    for group in groups:
        for member in group.consumers:
            tensor = zeroed.setdefault(member.parameter, tensor_attribute(gm, member.parameter).detach().clone())
            alive = set(surviving(member.layout, {group.axis: kept[group.axis]}))
            gone = [i for i in range(tensor.shape[member.dim]) if i not in alive]
            tensor.index_fill_(member.dim, torch.tensor(gone, dtype=torch.long), 0)
    for name, tensor in zeroed.items():
        owner, _, leaf = name.rpartition(".")
        result.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor)
    return result
