"""Recurrent layers: the hidden size is one axis of every gate, of the state and of the result.

    w_ih: (gates x hidden, input)    w_hh: (gates x hidden, hidden)    biases: (gates x hidden)

The states of all layers and directions are stacked in one tensor, so they share one hidden axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphopt.axes.call import Call
from graphopt.axes.layout import Layout, concat, product
from graphopt.axes.registry import Dims, rule

_REASON = "a projected state"


@rule("aten::lstm.input", "aten::gru.input", "aten::rnn_tanh.input", "aten::rnn_relu.input")
def recurrent(call: Call) -> list[Dims | None]:
    states = call.arg("hx") if isinstance(call.arg("hx"), list | tuple) else [call.arg("hx")]
    features = call.dims("input")[-1]
    hidden = call.dims_of(states[0])[-1]
    for state in states[1:]:
        call.unify_dims(call.dims_of(states[0]), call.dims_of(state))
    directions = 2 if call.arg("bidirectional") else 1
    per_cell = 4 if call.arg("has_biases") else 2
    parameters = list(call.arg("params"))
    cells = [parameters[at : at + per_cell] for at in range(0, len(parameters), per_cell)]
    if len(cells) != directions * int(call.arg("num_layers")):
        return _projected(call)
    for index, cell in enumerate(cells):
        _cell(call, cell, features, hidden)
        if index % directions == directions - 1:
            features = concat([hidden] * directions)
    result = (*call.dims("input")[:-1], features)
    return [result, *(call.dims_of(state) for state in states)]


def _projected(call: Call) -> list[Dims | None]:
    """Keep everything whole where the state is projected to another size than the gates have."""
    call.freeze(call.dims("input"), _REASON)
    for name in ("hx", "params"):
        for dims in call.many(name):
            call.freeze(dims, _REASON)
    return [call.axes(call.shape(index), call.because(_REASON)) for index in range(len(call.node.meta["val"]))]


@rule("aten::gru_cell", "aten::rnn_tanh_cell", "aten::rnn_relu_cell")
def cell(call: Call) -> Dims:
    state = call.dims("hx")
    call.unify_dims(call.dims("input")[:-1], state[:-1])
    _cell(call, _weights(call), call.dims("input")[-1], state[-1])
    return state


@rule("aten::lstm_cell")
def lstm_cell(call: Call) -> list[Dims | None]:
    first, second = call.many("hx")
    call.unify_dims(first, second)
    call.unify_dims(call.dims("input")[:-1], first[:-1])
    _cell(call, _weights(call), call.dims("input")[-1], first[-1])
    return [first, second]


def _weights(call: Call) -> list[Any]:
    return [call.arg(name) for name in ("w_ih", "w_hh", "b_ih", "b_hh") if call.has(name)]


def _cell(call: Call, weights: Sequence[Any], features: Layout, hidden: Layout) -> None:
    """State the equations of one cell; `weights` are w_ih, w_hh and, if it has them, the two biases."""
    w_ih, w_hh, *biases = weights
    rows, inputs = call.dims_of(w_ih)
    gates = call.axis(call.ratio(rows, hidden), call.because("gates"))
    stacked = product([gates, hidden])
    call.unify(rows, stacked)
    call.unify(inputs, features)
    call.unify(call.dims_of(w_hh)[0], stacked)
    call.unify(call.dims_of(w_hh)[1], hidden)
    for bias in biases:
        call.unify(call.dims_of(bias)[0], stacked)
    for weight in (w_ih, w_hh):
        call.produces(weight, 0)
        call.consumes(weight, 1)
