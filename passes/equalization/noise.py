"""What rounding to integers adds to what layers compute, by the model of uniform noise, and the scales that lower it.

    noise of output o = D^2 / 12 * sum of W_o^2  +  d_o^2 / 12 * sum over inputs of E x^2

D is the step of the input, one for all of its channels, d_o that of the weights of the output: with channels x / s and
weights W s, the largest x_j / s_j sets D and the largest W_oj s_j sets d_o (Xiao et al. 2023, "SmoothQuant"). Each
output counts by how much of it the noise is: a later layer may scale it to any size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.quantization.histogram import ChannelRange

_INPUT_STEPS, _WEIGHT_STEPS = 255, 127
_STRENGTHS = tuple(step / 8 for step in range(1, 9))  # shares of the channels' differences that go to the weights
_MOST = 15  # powers of two that channels are scaled by: more would meet the ends of half precision


def noise(seen: ChannelRange, weights: Sequence[Tensor], scale: Tensor) -> Tensor:
    """Return the power of the noise that rounding adds to each output over its own, (outputs of all layers,).

    Args:
        seen: the channels of the value that all the layers read.
        weights: of each layer, (groups, outputs, inputs, taps) float64.
        scale: what channels are divided by, (channels,) float64.
    """
    low, high = (seen.low / scale).min().clamp(max=0), (seen.high / scale).max().clamp(min=0)
    step = (high - low) / _INPUT_STEPS
    shares = []
    for weight in weights:
        groups, _, inputs, taps = weight.shape
        squares = seen.square.view(groups, 1, inputs)
        scaled = weight * scale.view(groups, 1, inputs, 1)
        steps = scaled.abs().amax((2, 3)) / _WEIGHT_STEPS
        of_input = step.square() * scaled.square().sum((2, 3))
        of_weights = steps.square() * taps * (squares / scale.view(groups, 1, inputs).square()).sum(2)
        shares.append(((of_input + of_weights) / 12 / (weight.square().sum(3) * squares).sum(2)).flatten())
    return torch.cat(shares)


def best_scale(seen: ChannelRange, weights: Sequence[Tensor]) -> tuple[Tensor, float]:
    """Return the powers of two that bring outputs nearest, and by how many dB: the mean over outputs."""
    best, gain = torch.ones_like(seen.high), 0.0
    before = noise(seen, weights, best)
    alive = torch.isfinite(before) & (before > 0)  # of what is always zero nothing is known
    if not bool(alive.any()):
        return best, gain
    for strength in _STRENGTHS:
        scale = _scale(seen, weights, strength)
        found = float(10 * torch.log10(before / noise(seen, weights, scale))[alive].mean())
        if found > gain:
            best, gain = scale, found
    return best, gain


def _scale(seen: ChannelRange, weights: Sequence[Tensor], strength: float) -> Tensor:
    """Return max|x|^a / max|W|^(1 - a) for each channel, to a power of two, 1 where either is zero."""
    values = torch.maximum(seen.high.abs(), seen.low.abs())
    largest = torch.stack([weight.abs().amax((1, 3)).flatten() for weight in weights]).amax(0)
    wanted = strength * values.log2() - (1 - strength) * largest.log2()
    alive = torch.isfinite(wanted)
    if not bool(alive.any()):
        return torch.ones_like(values)
    powers = (wanted - wanted[alive].median()).round().clamp(-_MOST, _MOST)
    return torch.where(alive, torch.exp2(powers), 1.0)
