"""A recurrent layer whose kernel reads integer weights and rounds its inputs itself, as an operator of the graph.

    dynamic_lstm(x, h, c, ..)    gates_t = d(x) W' + d(h_{t-1}) R' + b        i, o, f, g = gates_t
                                 c_t = s(f) c_{t-1} + s(i) tanh(g)            h_t = s(o) tanh(c_t)

d rounds to uint8 by the range of its argument (`dynamic_quantize`): of the whole input once, of the hidden state at
every step. W' and R' are dequantized. It is what com.microsoft.DynamicQuantizeLSTM computes, in its layouts. ONNX
Runtime may split a batch among threads, each with a range of its own: its results are near, not equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphopt.quantization.ops import dequantize, dynamic_quantize

Read = Callable[[Tensor], Tensor]


@torch.library.custom_op("graphopt::dynamic_lstm", mutates_args=())
def dynamic_lstm(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    recurrent: Tensor,
    recurrent_scale: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one layer, forwards or, where the weights have two directions, both ways.

    Args:
        x: (steps, batch, inputs) floating.
        h: (directions, batch, hidden), the hidden state at first.
        c: likewise, the cell state.
        weight: (directions, inputs, 4 * hidden) int8, of the gates input, output, forget and cell.
        weight_scale: (directions, 4 * hidden).
        recurrent: (directions, hidden, 4 * hidden) int8.
        recurrent_scale: (directions, 4 * hidden).
        bias: (directions, 8 * hidden): that of the inputs, then that of the hidden state.

    Returns:
        Hidden states (steps, directions, batch, hidden), and the last hidden and cell states, shaped as `h`.
    """
    stored = (weight, weight_scale, recurrent, recurrent_scale, bias)
    return lstm(x, h, c, *stored, read=lambda value: dequantize(*dynamic_quantize(value), None))


@dynamic_lstm.register_fake
def _(x: Tensor, h: Tensor, c: Tensor, *stored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_shapes(x, h, c, *stored)
    return x.new_empty((x.shape[0], *h.shape)), torch.empty_like(h), torch.empty_like(c)


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    """Run it again, with what is rounded passed straight through; integers have no gradient."""
    wanted = [index for index, needed in enumerate(ctx.needs_input_grad) if needed]
    given = [tensor.detach() for tensor in ctx.saved_tensors]
    with torch.enable_grad():
        for index in wanted:
            given[index].requires_grad_()
        found = torch.autograd.grad(
            lstm(*given, read=_straight_through), [given[index] for index in wanted], gradients, allow_unused=True
        )
    by_index = dict(zip(wanted, found, strict=True))
    return tuple(by_index.get(index) for index in range(len(given)))


def _straight_through(value: Tensor) -> Tensor:
    fixed = value.detach()
    rounded: Tensor = dequantize(*dynamic_quantize(fixed), None)
    return rounded + (value - fixed)


dynamic_lstm.register_autograd(_backward, setup_context=_setup)

DYNAMIC_LSTM = torch.ops.graphopt.dynamic_lstm.default


def lstm(x: Tensor, h: Tensor, c: Tensor, *stored: Tensor, read: Read) -> tuple[Tensor, Tensor, Tensor]:
    """Run what `dynamic_lstm` runs on inputs and hidden states that are read through `read`."""
    _check_shapes(x, h, c, *stored)
    weight, weight_scale, recurrent, recurrent_scale, bias = stored
    ends = [
        _one_way(
            x if index == 0 else x.flip(0),
            h[index],
            c[index],
            weight[index].to(x.dtype) * weight_scale[index],
            recurrent[index].to(x.dtype) * recurrent_scale[index],
            bias[index].reshape(2, -1).sum(0),
            read,
        )
        for index in range(len(h))
    ]
    ways = [states if index == 0 else states.flip(0) for index, (states, _, _) in enumerate(ends)]
    return torch.stack(ways, 1), torch.stack([end[1] for end in ends]), torch.stack([end[2] for end in ends])


def _one_way(
    x: Tensor, h: Tensor, c: Tensor, weight: Tensor, recurrent: Tensor, bias: Tensor, read: Read
) -> tuple[Tensor, Tensor, Tensor]:
    known = read(x) @ weight + bias
    states = x.new_empty((len(x), *h.shape))
    for step, gates in enumerate(known):
        i, o, f, g = (gates + read(h) @ recurrent).chunk(4, dim=-1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        states[step] = h
    return states, h.clone(), c.clone()


def _check_shapes(x: Tensor, h: Tensor, c: Tensor, *stored: Tensor) -> None:
    """Refuse what would broadcast."""
    directions, batch, hidden = h.shape
    gates = 4 * hidden
    wanted = {
        "the input": (x, (x.shape[0], batch, x.shape[-1])),
        "the cell state": (c, (directions, batch, hidden)),
        "the weight": (stored[0], (directions, x.shape[-1], gates)),
        "its scale": (stored[1], (directions, gates)),
        "the recurrent weight": (stored[2], (directions, hidden, gates)),
        "the recurrent scale": (stored[3], (directions, gates)),
        "the bias": (stored[4], (directions, 2 * gates)),
    }
    for what, (tensor, shape) in wanted.items():
        if directions not in (1, 2) or tuple(tensor.shape) != shape:
            raise ValueError(f"An LSTM of {directions} directions and {hidden} units: {what} is {tuple(tensor.shape)}.")
