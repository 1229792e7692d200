"""Recurrent layers: a removed unit whose rows and columns are zero stays at zero for ever."""

from __future__ import annotations

from typing import Any

from graphopt.axes.proof.step import MaskedStep, masked_rule
from graphopt.axes.proof.value import Value, Vector, same_flags, union, zeroed


@masked_rule("aten::lstm.input", "aten::gru.input", "aten::rnn_tanh.input", "aten::rnn_relu.input")
def recurrent(step: MaskedStep) -> Any:
    """Zero every removed slice; a gate of zeros keeps a state of zero at zero (for LSTM, GRU, tanh and ReLU)."""
    x, parameters = step["input"], list(step["params"])
    step.require_whole(x.dead[:-1], "time or batch")
    states = step["hx"] if isinstance(step["hx"], list | tuple) else [step["hx"]]
    clean = [zeroed(value.tensor, value.dead) for value in states]
    result = step.run(
        input=zeroed(x.tensor, x.dead),
        hx=clean if isinstance(step["hx"], list | tuple) else clean[0],
        params=[zeroed(value.tensor, value.dead) for value in parameters],
    )
    output, state = _survivors(step, parameters)
    hidden = union(states[-1].dead[-1], state[1])
    dead = [(None, None, union(states[0].dead[-1], state[0])), (None, None, hidden)]
    return [Value(result[0], (None, None, output)), *(Value(t, d) for t, d in zip(result[1:], dead, strict=False))]


def _survivors(step: MaskedStep, parameters: list[Value]) -> tuple[Vector, tuple[Vector, Vector]]:
    """Return what is removed of the output, and of the last dimension of the state and of the cell state.

    The state is read off the recurrent weights, (gates x hidden, state), the cell state off the projection, (state,
    hidden), where there is one.
    """
    directions = 2 if step["bidirectional"] else 1
    per_cell = len(parameters) // (int(step["num_layers"]) * directions)
    cells = [parameters[start : start + per_cell] for start in range(0, len(parameters), per_cell)]
    state = _common(step, [weights[1].dead[1] for weights in cells])
    hidden = _common(step, [weights[-1].dead[1] for weights in cells]) if per_cell % 2 else state
    output = state.repeat(directions) if state is not None else None
    return output, (state, hidden)


def _common(step: MaskedStep, every: list[Vector]) -> Vector:
    if any(not same_flags(flags, every[0]) for flags in every):
        step.require_whole(every, "layers of which different units are removed")
    return every[0]


@masked_rule("aten::gru_cell", "aten::rnn_tanh_cell", "aten::rnn_relu_cell", "aten::lstm_cell")
def cell(step: MaskedStep) -> Any:
    """One step: as for a layer, a unit whose rows and columns are zero stays at zero."""
    clean = {n: zeroed(v.tensor, v.dead) for n, v in step.arguments.items() if isinstance(v, Value)}
    several = isinstance(step["hx"], list | tuple)
    states: list[Value] = list(step["hx"]) if several else [step["hx"]]
    if several:
        clean["hx"] = [zeroed(v.tensor, v.dead) for v in states]  # type: ignore[assignment]
    result = step.run(**clean)
    units = union(step["w_hh"].dead[1], *(v.dead[-1] for v in states))
    batch = union(step["input"].dead[0], *(v.dead[0] for v in states)) if states[0].tensor.dim() > 1 else None
    dead = (batch, units)[-states[0].tensor.dim() :]
    return [Value(t, dead) for t in result] if several else Value(result, dead)
