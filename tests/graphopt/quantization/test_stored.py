"""Whether anything of a program is stored as integers, and what is read of such."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graphopt import load
from graphopt.capturing.capture import capture
from graphopt.ir.operators import short_name
from graphopt.ir.program import Program
from graphopt.measure.left_float import left_float
from graphopt.passes.codebook import Codebook, CodebookOptions
from graphopt.passes.half import Half, HalfOptions
from graphopt.passes.int8 import Int8, Int8Options
from graphopt.passes.weights import Weights
from graphopt.pipeline.context import Context
from graphopt.pipeline.pass_base import Pass
from graphopt.quantization.stored import is_quantized, stored_as_integers
from tests.passes.int8_models import WITHOUT_COSTS


class Words(nn.Module):
    """Reads a table, runs a GRU that nothing quantizes, and has bytes of its own that stand for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.gru = nn.Embedding(1024, 16), nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 64)
        self.register_buffer("known", torch.ones(1024, dtype=torch.uint8))

    def forward(self, ids: Tensor) -> Tensor:
        states: Tensor = self.gru(self.table(ids))[0]
        return self.head(states) * self.known[ids].unsqueeze(-1)  # type: ignore[index]


@pytest.fixture(scope="module")
def words() -> Program:
    return capture(Words().eval(), (torch.zeros(2, 3, dtype=torch.long),))


def after(step: Pass, program: Program) -> Program:
    context = Context(original=program, targets=(WITHOUT_COSTS,), target=WITHOUT_COSTS)
    return step.apply(program, step.plan(program, context))


@pytest.mark.parametrize(
    "step",
    [Int8(Int8Options(mode="dynamic", skip=("head",))), Weights(), Codebook(CodebookOptions(inputs=False))],
    ids=lambda step: step.name,
)
def test_a_table_or_a_codebook_is_enough(words: Program, step: Pass, tmp_path: Path) -> None:
    program = after(step, words)
    program.save(tmp_path / "stored.pt2")
    for one in (program, load(tmp_path / "stored.pt2")):
        assert is_quantized(one)
        assert "`gru`" in left_float(one)[0]


def test_bytes_of_the_model_and_other_floats_are_none(words: Program) -> None:
    assert not is_quantized(words)
    assert not is_quantized(after(Half(HalfOptions(compute="no")), words))


def test_weights_are_read_of_integers_values_are_not(words: Program) -> None:
    program = after(Codebook(CodebookOptions(inputs=False)), words)
    stored = stored_as_integers(program.graph)
    head = next(node for node in program.graph.nodes if short_name(node) == "linear")
    assert head.args[1] in stored
    assert head not in stored
    assert "`head`" not in "".join(left_float(program))
