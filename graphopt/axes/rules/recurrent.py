"""Recurrent layers: the hidden size is one axis of every gate, of the state and of the result.

    w_ih: (gates x hidden, input)    w_hh: (gates x hidden, hidden)    biases: (gates x hidden)

The states of all layers and directions are stacked in one tensor, so they share one hidden axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphopt.axes.call import Call
from graphopt.axes.layout import Dims, Layout, concat, product
from graphopt.axes.registry import rule


@rule("aten::lstm.input", "aten::gru.input", "aten::rnn_tanh.input", "aten::rnn_relu.input")
def recurrent(call: Call) -> list[Dims | None]:
    """Run cells over time; a projected LSTM (last weight of a cell) has a state narrower than its gates."""
    states = call.arg("hx") if isinstance(call.arg("hx"), list | tuple) else [call.arg("hx")]
    features = call.dims("input")[-1]
    state = call.dims_of(states[0])[-1]
    hidden = call.dims_of(states[-1])[-1]  # of an LSTM: of the cell state, which is not projected
    for other in states[1:]:
        call.unify_dims(call.dims_of(states[0])[:-1], call.dims_of(other)[:-1])
    directions = 2 if call.arg("bidirectional") else 1
    cells = _cells(call, directions)
    if len(cells[0]) % 2 == 0:
        call.unify(state, hidden)
    else:
        call.freeze(hidden, "torch knows a projected LSTM by a hidden size that is not the projected one")
    for index, weights in enumerate(cells):
        _cell(call, weights, features, hidden, state)
        if index % directions == directions - 1:
            features = concat([state] * directions)
    result = (*call.dims("input")[:-1], features)
    return [result, *(call.dims_of(node) for node in states)]


def _cells(call: Call, directions: int) -> list[list[Any]]:
    """Return the weights of each cell: w_ih, w_hh, two biases if it has them, and the projection if it has one."""
    parameters = list(call.arg("params"))
    per_cell = len(parameters) // (directions * int(call.arg("num_layers")))
    return [parameters[at : at + per_cell] for at in range(0, len(parameters), per_cell)]


@rule("aten::gru_cell", "aten::rnn_tanh_cell", "aten::rnn_relu_cell")
def cell(call: Call) -> Dims:
    state = call.dims("hx")
    call.unify_dims(call.dims("input")[:-1], state[:-1])
    _cell(call, _weights(call), call.dims("input")[-1], state[-1], state[-1])
    return state


@rule("aten::lstm_cell")
def lstm_cell(call: Call) -> list[Dims | None]:
    first, second = call.many("hx")
    call.unify_dims(first, second)
    call.unify_dims(call.dims("input")[:-1], first[:-1])
    _cell(call, _weights(call), call.dims("input")[-1], first[-1], first[-1])
    return [first, second]


def _weights(call: Call) -> list[Any]:
    return [call.arg(name) for name in ("w_ih", "w_hh", "b_ih", "b_hh") if call.has(name)]


def _cell(call: Call, weights: Sequence[Any], features: Layout, hidden: Layout, state: Layout) -> None:
    """State the equations of one cell.

    Args:
        call: the call.
        weights: w_ih (gates x hidden, features), w_hh (gates x hidden, state), two biases (gates x hidden) or none,
            and, where their number is odd, the projection (state, hidden).
        features: of the input.
        hidden: of the gates.
        state: of what is returned and fed back.
    """
    w_ih, w_hh, *others = weights
    projection = [others.pop()] if len(others) % 2 else []
    rows, inputs = call.dims_of(w_ih)
    gates = call.axis(call.ratio(rows, hidden), call.because("gates"))
    stacked = product([gates, hidden])
    call.unify(rows, stacked)
    call.unify(inputs, features)
    call.unify(call.dims_of(w_hh)[0], stacked)
    call.unify(call.dims_of(w_hh)[1], state)
    for bias in others:
        call.unify(call.dims_of(bias)[0], stacked)
    for weight in projection:
        call.unify_dims(call.dims_of(weight), (state, hidden))
    for weight in (w_ih, w_hh, *projection):
        call.produces(weight, 0)
        call.consumes(weight, 1)
