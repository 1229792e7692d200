"""Recurrent layers: a removed unit whose rows and columns are zero stays at zero for ever."""

from __future__ import annotations

from typing import Any

from graphopt.axes.oracle.step import Step, masked_rule
from graphopt.axes.oracle.value import Value, Vector, union, zeroed


@masked_rule("aten::lstm.input", "aten::gru.input", "aten::rnn_tanh.input", "aten::rnn_relu.input")
def recurrent(step: Step) -> Any:
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
    hidden = _hidden(step, parameters, result[0].size(-1))
    state: Vector = union(*(value.dead[-1] for value in states), hidden[1])
    return [Value(result[0], (None, None, hidden[0])), *(Value(t, (None, None, state)) for t in result[1:])]


def _hidden(step: Step, parameters: list[Value], width: int) -> tuple[Vector, Vector]:
    """Return what is removed of the output's and of the state's last dimension, from the recurrent weights."""
    per_layer = 4 if step["has_biases"] else 2
    if len(parameters) != per_layer * int(step["num_layers"]) * (2 if step["bidirectional"] else 1):
        step.require_whole([flags for value in parameters for flags in value.dead], "a projected layer")
    directions = 2 if step["bidirectional"] else 1
    recurrent = [group[1].dead[1] for group in _grouped(parameters, per_layer)]
    last = recurrent[-directions:]
    if any(not _same(flags, last[0]) for flags in recurrent):
        step.require_whole(recurrent, "layers of which different units are removed")
    output = last[0].repeat(directions) if last[0] is not None else None
    assert output is None or output.numel() == width
    return output, last[0]


def _same(a: Vector, b: Vector) -> bool:
    return a is b if a is None or b is None else a.equal(b)


def _grouped(parameters: list[Value], size: int) -> list[list[Value]]:
    return [parameters[start : start + size] for start in range(0, len(parameters), size)]
