"""Random compositions of operators on tensors of any rank: what the inference lets go is proved, nothing is wrong."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from graphopt.axes.infer import infer
from graphopt.axes.proof.masked import check_masked_equivalence
from graphopt.axes.rewrite import remove, slices
from graphopt.capturing.normal_form import normalise

_LARGEST = 3000  # elements of a value


@dataclass(frozen=True)
class Step:
    """One random operation: what it does and three numbers it may use."""

    kind: str
    a: int
    b: int
    c: int


class Program(nn.Module):
    """Applies steps to a tensor, remembering earlier ones; parameters are made in the first run."""

    def __init__(self, steps: list[Step], seed: int) -> None:
        super().__init__()
        self.steps, self.made = steps, nn.ParameterList()
        self.generator = torch.Generator().manual_seed(seed)
        self.at = 0
        self(torch.zeros(2, 5, dtype=torch.float64))

    def weight(self, *shape: int) -> Tensor:
        """Return the next parameter."""
        if self.at == len(self.made):
            self.made.append(nn.Parameter(torch.randn(shape, generator=self.generator, dtype=torch.float64)))
        self.at += 1
        return self.made[self.at - 1]

    def forward(self, x: Tensor) -> Tensor:
        self.at = 0
        x = (x @ self.weight(5, 24)).unflatten(1, (4, 6))
        seen = [x]
        for step in self.steps:
            x = OPERATIONS[step.kind](self, x, seen[step.a % len(seen)], step)
            seen.append(x)
        return torch.tanh(x).flatten(1) @ self.weight(math.prod(x.shape[1:]), 3)


Operation = Callable[[Program, Tensor, Tensor, Step], Tensor]
OPERATIONS: dict[str, Operation] = {}


def operation(function: Operation) -> Operation:
    """Let the function be drawn."""
    OPERATIONS[function.__name__] = function
    return function


def some_dim(x: Tensor, number: int) -> int:
    """Return a dimension that is not the batch."""
    return 1 + number % (x.dim() - 1) if x.dim() > 1 else 0


@operation
def linear(p: Program, x: Tensor, old: Tensor, step: Step) -> Tensor:
    d = some_dim(x, step.b)
    width = 2 + step.c % 7
    if x.numel() // x.shape[d] * width > _LARGEST:
        width = 2
    return F.linear(x.movedim(d, -1), p.weight(width, x.shape[d]), p.weight(width)).movedim(-1, d)


@operation
def activation(p: Program, x: Tensor, old: Tensor, step: Step) -> Tensor:
    return (torch.tanh, F.gelu, torch.sigmoid, torch.sin)[step.b % 4](x)


@operation
def normalised(p: Program, x: Tensor, old: Tensor, step: Step) -> Tensor:
    d = some_dim(x, step.b)
    if step.c % 4 == 0:
        return F.layer_norm(x, x.shape[-1:], p.weight(x.shape[-1]), p.weight(x.shape[-1]))
    if step.c % 4 == 1:
        return x * torch.rsqrt(x.pow(2).mean(d, keepdim=True) + 1)
    if step.c % 4 == 2:
        return (x - x.mean(d, keepdim=True)) / (x.var(d, keepdim=True, unbiased=False) + 1).sqrt()
    return x.softmax(d)


@operation
def cut_in_factors(p: Program, x: Tensor, old: Tensor, step: Step) -> Tensor:
    d = some_dim(x, step.b)
    factors = [f for f in (2, 3, 4) if x.shape[d] % f == 0 and x.shape[d] > f]
    return x.unflatten(d, (factors[step.c % len(factors)], -1)) if factors and x.dim() < 6 else x


@operation
def merged(p: Program, x: Tensor, old: Tensor, step: Step) -> Tensor:
    d = some_dim(x, step.b)
    return x.flatten(d, d + 1) if d + 1 < x.dim() else x.reshape(x.shape[0], -1)


@operation
def permuted(p: Program, x: Tensor, old: Tensor, step: Step) -> Tensor:
    return x.transpose(some_dim(x, step.b), some_dim(x, step.c))


@operation
def added(p: Program, x: Tensor, old: Tensor, step: Step) -> Tensor:
    if old.shape == x.shape:
        return x + old if step.b % 2 else x * torch.tanh(old)
    return x + p.weight(*x.shape[1:]) if step.b % 2 else x * p.weight(x.shape[-1])


@operation
def joined(p: Program, x: Tensor, old: Tensor, step: Step) -> Tensor:
    d = some_dim(x, step.b)
    fits = old.dim() == x.dim() and all(
        a == b for e, (a, b) in enumerate(zip(x.shape, old.shape, strict=True)) if e != d
    )
    other = old if fits else -x
    return torch.cat([x, other], d) if x.numel() + other.numel() <= _LARGEST else x


@operation
def parts(p: Program, x: Tensor, old: Tensor, step: Step) -> Tensor:
    d = some_dim(x, step.b)
    n = x.shape[d]
    if n % 2 == 0 and step.c % 3 == 0:
        left, right = x.chunk(2, d)
        return torch.sigmoid(left) * right
    if n % 2 == 0 and step.c % 3 == 1:
        left, right = x.chunk(2, d)
        return torch.cat([-right, left], d) + x
    start = step.c % n
    return x.narrow(d, start, max(1, (n - start) // 2))


@operation
def strided(p: Program, x: Tensor, old: Tensor, step: Step) -> Tensor:
    if x.shape[-1] % 2:
        return x[..., : max(1, x.shape[-1] - 1)]
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even - odd, odd], -1).flatten(-2)


@operation
def position(p: Program, x: Tensor, old: Tensor, step: Step) -> Tensor:
    d = some_dim(x, step.b)
    one = x.select(d, step.c % x.shape[d]).unsqueeze(d)
    return one + x if step.c % 2 else torch.cat([one, x], d)


@operation
def attention(p: Program, x: Tensor, old: Tensor, step: Step) -> Tensor:
    if x.dim() < 3:
        return x
    if step.b % 2:
        return F.scaled_dot_product_attention(x, torch.tanh(x), x)
    return (x @ x.transpose(-1, -2)).softmax(-1) @ x


@operation
def ordered(p: Program, x: Tensor, old: Tensor, step: Step) -> Tensor:
    d = some_dim(x, step.b)
    choice = (torch.flip(x, (d,)), torch.roll(x, 1, d), x.cumsum(d), x.sort(d).values, x.cummax(d).values)
    return choice[step.c % len(choice)]


@operation
def repeated(p: Program, x: Tensor, old: Tensor, step: Step) -> Tensor:
    if 2 * x.numel() > _LARGEST:
        return x
    d = some_dim(x, step.b)
    times = [1 + (e == d) for e in range(x.dim())]
    return x.repeat(times) if step.c % 2 else x.repeat_interleave(2, d)


@operation
def padded(p: Program, x: Tensor, old: Tensor, step: Step) -> Tensor:
    return F.pad(x, (step.b % 2, step.c % 3)) if x.numel() * 2 < _LARGEST else x


@operation
def reduced(p: Program, x: Tensor, old: Tensor, step: Step) -> Tensor:
    if x.dim() < 3:
        return x
    d = some_dim(x, step.b)
    return (x.mean(d), x.amax(d), x.sum(d), x.logsumexp(d))[step.c % 4]


@operation
def gated(p: Program, x: Tensor, old: Tensor, step: Step) -> Tensor:
    """Squeeze to two hidden units and excite."""
    d = some_dim(x, step.b)
    others = tuple(e for e in range(1, x.dim()) if e != d)
    pooled = x.mean(others) if others else x
    gate = torch.sigmoid(F.linear(torch.tanh(F.linear(pooled, p.weight(2, x.shape[d]))), p.weight(x.shape[d], 2)))
    return x * gate.view([n if e in (0, d) else 1 for e, n in enumerate(x.shape)])


@operation
def mixed_in_groups(p: Program, x: Tensor, old: Tensor, step: Step) -> Tensor:
    n = x.shape[-1]
    groups = next(g for g in (3, 2, 1) if n % g == 0)
    y = torch.einsum("...gi,gio->...go", x.unflatten(-1, (groups, -1)), p.weight(groups, n // groups, n // groups))
    return y.transpose(-1, -2).flatten(-2) if step.c % 2 else y.flatten(-2)


@operation
def convolved(p: Program, x: Tensor, old: Tensor, step: Step) -> Tensor:
    if x.dim() != 3:
        return x
    n = x.shape[1]
    groups = (n, 1, 2 if n % 2 == 0 else 1)[step.b % 3]
    return F.conv1d(x, p.weight(n, n // groups, 1 + 2 * (step.c % 2)), padding=step.c % 2, groups=groups)


@operation
def outer(p: Program, x: Tensor, old: Tensor, step: Step) -> Tensor:
    if x.numel() * x.shape[-1] > _LARGEST:
        return x
    pairs = x.unsqueeze(-1) * torch.tanh(x).unsqueeze(-2)
    return pairs.flatten(-2) if step.b % 2 else pairs.sum(-1 - step.c % 2)


@operation
def chosen(p: Program, x: Tensor, old: Tensor, step: Step) -> Tensor:
    if step.b % 2:
        return torch.where(x > 0, x, torch.zeros_like(x)).masked_fill(x < -1, 0.5)
    index = torch.arange(x.shape[-1]).roll(step.c)
    return x[..., index]


@operation
def counted(p: Program, x: Tensor, old: Tensor, step: Step) -> Tensor:
    """A weighted mean whose weights start as zeros."""
    d = some_dim(x, step.b)
    weights = (torch.zeros(x.shape, dtype=x.dtype) if step.c % 2 else x.new_ones(x.shape)).softmax(d)
    return x * weights / weights.sum(d, keepdim=True)


STEPS = st.lists(
    st.builds(Step, st.sampled_from(sorted(OPERATIONS)), st.integers(0, 6), st.integers(0, 11), st.integers(0, 11)),
    min_size=3,
    max_size=9,
)
BOUNDED = {"derandomize": True, "deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


def exported(model: nn.Module, x: Tensor) -> fx.GraphModule:
    gm = torch.export.export(model, (x,), strict=False).module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    return normalise(gm)


@settings(max_examples=40, **BOUNDED)  # type: ignore[arg-type]
@given(STEPS, st.integers(0, 2**16))
def test_whatever_may_go_goes_right(steps: list[Step], seed: int) -> None:
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gm = exported(Program(steps, seed), x)
    axes = infer(gm)
    assert not axes.unknown
    draw = random.Random(seed)
    kept = {g.axis: sorted(draw.sample(range(g.size), draw.randint(1, g.size))) for g in axes.groups()}
    pruned = remove(gm, axes, kept)
    assert pruned(x).shape == (2, 3)
    check_masked_equivalence(gm, pruned, slices(axes, kept), (x,))
