"""`graphopt inspect`: what a model file holds, before anything is done to it."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

from graphopt.cli import arguments
from graphopt.cli.arguments import (
    Data,
    Dynamic,
    Factory,
    Format,
    Input,
    ModelArguments,
    ModelPath,
    Seed,
    Trust,
    Weights,
)


def command(
    model: ModelPath = None,
    data: Data = None,
    inputs: Input = None,
    dynamic: Dynamic = None,
    factory: Factory = None,
    weights: Weights = None,
    trust: Trust = False,
    seed: Seed = 0,
    format: Format = "text",
) -> None:
    """Show inputs, outputs, operators and cost of a model."""
    arguments.check_format(format)
    source = ModelArguments(
        model=model, data=data, inputs=inputs, dynamic=dynamic, factory=factory, weights=weights, trust=trust, seed=seed
    )
    program, _ = source.load()
    from graphopt.ir.operators import short_name
    from graphopt.measure.cost import cost

    found = cost(program)
    operators = Counter(short_name(node) for node in program.graph.nodes if node.op == "call_function")
    facts: dict[str, Any] = {
        "model": str(model or factory),
        "inputs": [str(spec) for spec in program.inputs],
        "outputs": [str(spec) for spec in program.outputs],
        "parameters": found.parameters,
        "flops": found.flops,
        "bytes": found.bytes,
        "operators": dict(operators.most_common()),
        "notes": [f"{note.subject}: {note.text}" for note in program.notes],
    }
    if format == "json":
        json.dump(facts, sys.stdout, indent=1)
        print()
    else:
        _print(facts)


def _print(facts: dict[str, Any]) -> None:
    from graphopt.cli.table import count, new_table, terminal

    console = terminal()
    table = new_table(facts["model"])
    table.show_header = False
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("inputs", "\n".join(facts["inputs"]))
    table.add_row("outputs", "\n".join(facts["outputs"]))
    table.add_row("parameters", count(facts["parameters"]))
    table.add_row("FLOPs a sample", count(facts["flops"]))
    table.add_row("bytes of tensors", f"{count(facts['bytes'])}B")
    table.add_row("operators", ", ".join(f"{number} {name}" for name, number in facts["operators"].items()))
    for note in facts["notes"]:
        table.add_row("note", note)
    console.print(table)
