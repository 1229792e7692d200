"""Scaling channels to like ranges changes no digit of a program, and what integers leave of it is nearer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from graphopt.capturing.capture import capture
from graphopt.ir.program import Program
from graphopt.measure.equivalence import measure
from graphopt.passes.equalization.noise import best_scale, noise
from graphopt.passes.equalization.sites import find_sites
from graphopt.passes.equalize import Equalize, EqualizeOptions, EqualizePlan
from graphopt.passes.int8 import Int8
from graphopt.pipeline.context import Context
from graphopt.quantization.histogram import ChannelRange
from graphopt.testing import TensorSamples, check_pass
from tests.passes.int8_models import WITHOUT_COSTS, seeded  # fmt: skip
from tests.passes.int8_models import noise as drawn


class Tokens(nn.Module):
    """Pre-norm and post-norm: the first norm's result goes to a layer alone, the second's to a sum as well."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.after, self.last = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.after(x + self.down(F.gelu(self.up(self.before(x)))))
        return y + self.last(y)


class Convolutions(nn.Module):
    """A depthwise and a plain convolution, a LeakyReLU and pooling between, into a linear layer behind a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.second, self.last = nn.Conv2d(8, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = self.second(F.leaky_relu(self.depthwise(x)))
        return self.last(F.adaptive_avg_pool2d(x, 1).flatten(1))


def uneven(model: Tokens | Convolutions) -> nn.Module:
    """Let every other channel that a layer reads be 64 times as large, and count as much less there."""
    seeded(model)
    if isinstance(model, Tokens):
        pairs = [(model.before, model.up), (model.after, model.last)]
    else:
        pairs = [(model.first, model.depthwise), (model.depthwise, model.second), (model.second, model.last)]
    for maker, reader in pairs:
        for tensor in maker.parameters():
            tensor.data[::2] *= 64
        inputs = reader.weight.data if reader.weight.shape[1] == 1 else reader.weight.data.transpose(0, 1)
        inputs[::2] /= 64
    return model


def equalized(model: nn.Module, data: Tensor, **options: float) -> tuple[Program, Program, EqualizePlan]:
    program = capture(model, (data[:2],))
    instance = Equalize(EqualizeOptions(**options))  # type: ignore[arg-type]
    plan = instance.plan(program, Context(original=program, samples=TensorSamples((data,))))
    return program, instance.apply(program, plan), plan


TOKENS, IMAGES = drawn(24, 5, 8), drawn(24, 3, 12, 12)


@pytest.fixture(scope="module")
def tokens() -> tuple[Program, Program, EqualizePlan]:
    return equalized(uneven(Tokens()), TOKENS)


@pytest.fixture(scope="module")
def convolutions() -> tuple[Program, Program, EqualizePlan]:
    return equalized(uneven(Convolutions()), IMAGES)


def test_norms_take_scales_in_and_shared_values_are_multiplied(
    tokens: tuple[Program, Program, EqualizePlan],
) -> None:
    program, result, plan = tokens
    assert [(one["value"], one["kind"], one["maker"], one["readers"]) for one in plan.values] == [
        ("layer_norm", "norm", "layer_norm", ["linear"]),
        ("layer_norm_1", "multiply", "", ["linear_2"]),
    ]
    assert torch.equal(program(TOKENS), result(TOKENS))


def test_convolutions_take_scales_in(convolutions: tuple[Program, Program, EqualizePlan]) -> None:
    program, result, plan = convolutions
    assert [(one["value"], one["kind"], one["maker"]) for one in plan.values] == [
        ("max_pool2d", "layer", "conv2d"),
        ("leaky_relu", "layer", "conv2d_1"),
        ("flatten", "layer", "conv2d_2"),
    ]
    assert len(list(result.graph.nodes)) == len(list(program.graph.nodes))
    torch.testing.assert_close(result(IMAGES), program(IMAGES), rtol=1e-6, atol=0)


@pytest.mark.parametrize("made", ["tokens", "convolutions"])
def test_it_is_exact_in_double_precision(made: str, request: pytest.FixtureRequest) -> None:
    program, result, _ = request.getfixturevalue(made)
    data = (TOKENS if made == "tokens" else IMAGES).double()
    wide = [one.copy(share_tensors=False).graph_module.double() for one in (program, result)]
    torch.testing.assert_close(wide[1](data), wide[0](data), rtol=1e-13, atol=0)


@pytest.mark.parametrize("made", ["tokens", "convolutions"])
def test_integers_leave_more_of_it(made: str, request: pytest.FixtureRequest) -> None:
    program, result, _ = request.getfixturevalue(made)
    data = TOKENS if made == "tokens" else IMAGES

    def ratio(one: Program) -> float:
        ctx = Context(original=one, targets=(WITHOUT_COSTS,), target=WITHOUT_COSTS, samples=TensorSamples((data,)))
        stored = Int8().apply(one, Int8().plan(one, ctx))
        return measure(program, stored.call_flat, (data,)).sqnr

    assert ratio(result) > ratio(program) + 2


def test_keeps_the_contract(tokens: tuple[Program, Program, EqualizePlan]) -> None:
    check_pass(Equalize(), tokens[0], TOKENS[:2], data=(TOKENS,))


class Refused(nn.Module):
    """Each value that a layer reads cannot be scaled, for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 1) for _ in range(4))
        self.head = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.b(F.relu6(self.a(x)))
        z = self.d(self.c(F.relu(y)) + y)
        return self.head(z), self.head(torch.tanh(z))


def test_says_why_values_are_left() -> None:
    _, _, plan = equalized(seeded(Refused()), drawn(16, 4, 6, 6), multiply=False)
    assert {refusal.site: refusal.reason for refusal in plan.refusals} == {
        "x": "it is an input of the program",
        "relu6": "`relu6` does not pass a factor of its channels",
        "relu": "the output of `conv2d_1` has another reader (`add`)",
        "add": "`add` does not pass a factor of its channels",
        "conv2d_3": "the weight of `linear` is shared with `linear_1`",
        "tanh": "the weight of `linear_1` is shared with `linear`",
    }
    assert plan.sites == ()


def test_even_channels_are_left() -> None:
    _, _, plan = equalized(seeded(Convolutions()), IMAGES, gain=12.0)
    assert {refusal.counted_as for refusal in plan.refusals} == {
        "it is an input of the program",
        "its channels have like ranges",
    }


def test_a_weight_that_would_lose_digits_is_left() -> None:
    model = seeded(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)))
    model[0].weight.data[:2] /= 1e4
    model[0].bias.data[:2] = 0
    model[2].weight.data[:] = 1.3e-38  # the smallest normal number is 1.2e-38
    _, _, plan = equalized(model, drawn(16, 4))
    (refusal,) = (refusal for refusal in plan.refusals if refusal.site == "relu")
    assert refusal.reason == "a weight would lose digits (`2.weight`)"


def test_channels_that_are_zero_are_not_scaled() -> None:
    seen = ChannelRange(1)
    seen.update(torch.tensor([[0.0, 1.0, 100.0], [0.0, -1.0, 3.0]]))
    weight = torch.ones(1, 2, 3, 1, dtype=torch.float64)
    weight[0, :, 1] = 0
    scale, gain = best_scale(seen, [weight])
    assert scale[:2].tolist() == [1.0, 1.0]
    assert gain == 0.0  # one channel is left to the layer, and one scale suits it


def test_the_model_of_noise_is_what_rounding_adds() -> None:
    """Uniform values, uniform weights: simulated rounding of both, against the formula."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(2000, 64, generator=generator, dtype=torch.float64) - 0.5) * torch.logspace(-0.5, 0.5, 64)
    weight = torch.rand(256, 64, generator=generator, dtype=torch.float64) - 0.5
    seen = ChannelRange(1)
    seen.update(x)
    scale = torch.exp2(torch.arange(64) % 3).double()
    step = ((x / scale).max() - (x / scale).min()) / 255
    steps = (weight * scale).abs().amax(1, keepdim=True) / 127
    rounded = ((x / scale / step).round() * step) @ ((weight * scale / steps).round() * steps).T
    added = (rounded - x @ weight.T).square().mean(0)
    power = weight.square() @ x.square().mean(0)
    assert float((noise(seen, [weight[None, :, :, None]], scale) * power / added.mean()).mean()) == pytest.approx(
        1, rel=0.1
    )


class PooledFeatures(nn.Module):
    """Pools along the axis that the layers around them make and read."""

    def __init__(self) -> None:
        super().__init__()
        self.made = nn.ModuleList(nn.Linear(4, 8) for _ in range(4))
        self.read = nn.ModuleList(nn.Linear(width, 2) for width in (8, 4, 4, 8))

    def forward(self, x: Tensor) -> list[Tensor]:
        rows = [layer(x) for layer in self.made]
        same = F.avg_pool1d(rows[0], 3, 1, 1), F.max_pool1d(rows[1], 2), F.adaptive_avg_pool1d(rows[2], 4)
        return [layer(y) for layer, y in zip(self.read, (*same, F.max_pool2d(rows[3], 3, 1, 1)), strict=True)]


def test_channels_that_are_pooled_together_have_one_scale() -> None:
    program = capture(PooledFeatures().eval(), (drawn(2, 5, 4),))
    sites, refusals = find_sites(program.graph_module, multiply=False)
    assert not sites
    assert {refusal.reason for refusal in refusals if "pool" in refusal.site} == {
        f"`{name}` does not pass a factor of its channels"
        for name in ("avg_pool1d", "max_pool1d", "adaptive_avg_pool1d", "max_pool2d")
    }
