"""Where nodes came from, also where a stranger's file or pass has left something else under the same key."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.ir.program import Program
from graphopt.ir.provenance import Origin, origin

FIELDS = {"node": "a", "module": "", "op": "linear"}


@pytest.fixture(scope="module")
def program() -> Program:
    return graphopt.capture(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), (torch.randn(2, 4),))


@pytest.mark.parametrize(
    "custom",
    [
        None, 3, "text", [], [1], {3: 4}, {"graphopt": None}, {"graphopt": []}, {"graphopt": "node"},
        {"graphopt": {**FIELDS, "more": ""}}, {"graphopt": {"node": "a"}}, {"graphopt": {**FIELDS, "node": 3}},
        {"graphopt": {**FIELDS, "site": ["x"]}}, {"_torchdynamo": 1}, {"graphopt_training": 3, "x": object()},
    ],
)  # fmt: skip
def test_notes_of_another_form_are_nothing(custom: Any, program: Program) -> None:
    program = program.copy()
    for node in program.graph.nodes:
        node.meta["custom"] = custom
    assert all(origin(node) is None for node in program.graph.nodes)
    program.train()
    program.eval()
    again = program.export()
    assert [node.op for node in again.graph.nodes].count("call_function") > 0
    result = graphopt.optimize(program, None, "fold", None)
    assert result.program(torch.randn(2, 4)).shape == (2, 3)


def test_notes_of_this_form_are_read(program: Program) -> None:
    node = next(iter(program.copy().graph.nodes))
    node.meta["custom"] = json.loads(json.dumps({"graphopt": FIELDS, "other": 1}))
    assert origin(node) == Origin("a", "", "linear")
