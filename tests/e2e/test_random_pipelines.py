"""Random pipelines of built-in passes: made, saved and opened, and replayed there is one result."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.job.result import Result
from graphopt.testing import assert_same_program, fingerprint
from tests.models import Depthwise, FusedAttention, GroupedQuery, Residual, TiedWeights, WeightNormed, example

MODELS: tuple[type[nn.Module], ...] = (Residual, Depthwise, FusedAttention, GroupedQuery, TiedWeights, WeightNormed)
# in an order that every pass agrees to, each with the settings of which one is drawn
PASSES = {
    "drop_blocks": (":ratio=0.6", ":ratio=0.3:criterion=random"),
    "prune": (":ratio=0.3:round_to=1", ":flops=0.9:scope=global:round_to=1", ":ratio=0.5:criterion=random:steps=2"),
    "svd": (":energy=0.9:min_rank=1", ":ratio=0.5:min_rank=1", ":rank=2:min_rank=1"),
    "sparsify": (":ratio=0.3", ":by=gradient:scope=global", ":ratio=0.6:steps=2:epochs=0"),
    "recover": (":epochs=1:samples=32:batch_size=8",),
    "sparsity24": ("", ":force=yes:refit=no"),
    "distill_hooks": ("",),
    "fold": ("",),
    "equalize": ("", ":gain=0"),
    "int8": ("", ":weights=tensor:bias_correction=no"),
    "qat": (":epochs=1:samples=32:batch_size=8",),
}


@st.composite
def pipelines(draw: st.DrawFn) -> str:
    """Draw some of the passes, in their order, each with some settings."""
    chosen = draw(st.sets(st.sampled_from(list(PASSES)), min_size=1, max_size=4))
    return ",".join(name + draw(st.sampled_from(options)) for name, options in PASSES.items() if name in chosen)


@functools.cache
def _captured(kind: type[nn.Module]) -> graphopt.Program:
    torch.manual_seed(0)
    x = example(kind, 4)
    return graphopt.capture(kind().eval(), x.float() if x.is_floating_point() else x)


def test_made_opened_and_replayed_is_one_result() -> None:
    rewritten: dict[str, int] = {}

    # shrinking a failure would take minutes
    @settings(max_examples=10, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    @given(st.sampled_from(MODELS), pipelines(), st.sampled_from((None, None, "onnxruntime")))
    def check(kind: type[nn.Module], text: str, target: str | None) -> None:
        data = example(kind, 64)
        data = data.float() if data.is_floating_point() else data
        result = graphopt.optimize(_captured(kind), data, text, target, bench=False)
        rewritten[text] = rewritten.get(text, 0) + sum(len(plan.sites) for plan in result.plans)
        with tempfile.TemporaryDirectory() as folder:
            result.save(folder)
            _check_opened(graphopt.open(folder), result, data[:3])
            assert result.original is not None
            replayed = graphopt.replay(result.original, Path(folder) / "manifest.json")
        made = {name: fingerprint(program) for name, program in result.programs.items()}
        assert {name: fingerprint(program) for name, program in replayed.items()} == made

    check()
    assert len(rewritten) >= 8
    assert sum(count > 0 for count in rewritten.values()) >= 6, rewritten


def _check_opened(opened: Result, result: Result, inputs: torch.Tensor) -> None:
    """Check all of a result but the names of nodes, which loading an exported program draws anew."""
    assert opened.report.to_json() == result.report.to_json()
    assert [plan.to_json() for plan in opened.plans] == [plan.to_json() for plan in result.plans]
    assert (opened.pipeline, opened.plan_targets) == (result.pipeline, result.plan_targets)
    assert opened.programs.keys() == result.programs.keys()
    for name, program in result.programs.items():
        assert_same_program(opened.programs[name], program)
        with torch.no_grad():
            _assert_equal(opened.programs[name].call_flat((inputs,)), program.call_flat((inputs,)))
    assert opened.artifacts.keys() == result.artifacts.keys()
    for name, artifact in result.artifacts.items():
        found, made = (one.session()(inputs.numpy()) for one in (opened.artifacts[name], artifact))
        _assert_equal([torch.as_tensor(one) for one in found], [torch.as_tensor(one) for one in made])


def _assert_equal(found: Sequence[torch.Tensor], made: Sequence[torch.Tensor]) -> None:
    torch.testing.assert_close(list(found), list(made), rtol=0, atol=0)


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.lstm = nn.Linear(32, 32), nn.LSTM(32, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.first(x))[0]


@pytest.mark.parametrize("of_a_file", [False, True])
def test_a_pass_behind_another_is_replayed_on_what_it_was_planned_on(tmp_path: Path, of_a_file: bool) -> None:
    torch.manual_seed(0)
    data = torch.randn(16, 5, 32)
    program = graphopt.capture(Steps().eval(), data[:2])
    program.save(tmp_path / "model.pt2")
    program, again = ((graphopt.load(tmp_path / "model.pt2") if of_a_file else program) for _ in range(2))
    result = graphopt.optimize(program, data, "weights:block=0,int8:mode=dynamic", None, bench=False)
    assert all(plan.sites for plan in result.plans)
    result.save(tmp_path / "out")
    replayed = graphopt.replay(again, tmp_path / "out" / "manifest.json")
    made = {name: fingerprint(program) for name, program in result.programs.items()}
    assert {name: fingerprint(program) for name, program in replayed.items()} == made
