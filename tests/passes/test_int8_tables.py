"""Embedding tables in int8: a scale for each row, floating when read; the runtime computes the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.backends.onnxruntime import OnnxRuntimeBackend
from graphopt.backends.tensorrt import TensorRTBackend
from graphopt.capturing.capture import capture
from graphopt.ir.program import Program
from graphopt.passes.int8 import Int8, Int8Options
from graphopt.passes.quantization.plan import Int8Plan
from graphopt.pipeline.context import Context
from graphopt.targets.description import TargetDescription

ROWS, FEATURES = 600, 32
TARGET = OnnxRuntimeBackend().description
IDS = torch.randint(0, ROWS, (4, 7), generator=torch.Generator().manual_seed(0))
aten = torch.ops.aten


class Words(nn.Module):
    """Reads one table twice, in float and behind a layer."""

    def __init__(self, *, tied: bool = False, rows: int = ROWS) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, FEATURES, padding_idx=0)
        self.head = nn.Linear(FEATURES, rows, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.table(ids) + self.table(ids.flip(1))
        return x, self.head(x)


def words(**options: bool | int) -> nn.Module:
    torch.manual_seed(1)
    return Words(**options).eval()  # type: ignore[arg-type]


def plan_of(program: Program, target: TargetDescription = TARGET, **options: tuple[str, ...]) -> Int8Plan:
    chosen = Int8Options(**{"skip": ("head",), **options})  # type: ignore[arg-type]
    return Int8(chosen).plan(program, Context(program, target=target))


def reason(program: Program, target: TargetDescription = TARGET, **options: tuple[str, ...]) -> str:
    plan = plan_of(program, target, **options)
    assert not plan.tables
    return next(refusal.reason for refusal in plan.refusals if refusal.site == "embedding")


def test_every_read_takes_the_stored_rows_and_the_table_goes(tmp_path: Path) -> None:
    model = words()
    program = capture(model, IDS)
    plan = plan_of(program)
    result = Int8(Int8Options(skip=("head",))).apply(program, plan)
    assert plan.sites == ("embedding", "embedding_1")
    stored = result.state_dict()
    assert {name: tensor.dtype for name, tensor in stored.items()} == {
        "head.weight": torch.float32,
        "table.weight_rows": torch.int8,
        "table.weight_rows_scale": torch.float32,
    }
    exact = stored["table.weight_rows"].double() * stored["table.weight_rows_scale"].double().unsqueeze(1)
    for ids in (IDS, IDS[:1, :3]):
        (found, _), wanted = result(ids), exact[ids] + exact[ids.flip(1)]
        torch.testing.assert_close(found.double(), wanted, rtol=2e-7, atol=1e-7)
        step = float(stored["table.weight_rows_scale"].max())
        assert float((found - model(ids)[0].detach()).abs().max()) <= step * (
            1 + 1e-5
        )  # half a step of each of two rows
    backend = OnnxRuntimeBackend()
    artifact = backend.lower(result, tmp_path / "model.onnx")
    assert backend.verify(artifact, graphopt.load(result.save(tmp_path / "model.pt2"))) < 1e-6


def test_a_head_that_shares_its_table_is_quantized_as_well() -> None:
    ids = torch.randint(0, ROWS, (64, 7), generator=torch.Generator().manual_seed(2))
    result = graphopt.optimize(words(tied=True), ids, "int8", bench=False, cache=False)
    stored = result.program.state_dict()
    assert [tensor.dtype for tensor in stored.values() if tensor.numel() > ROWS] == [torch.int8]
    assert result.artifact.size < 1.6 * ROWS * FEATURES
    facts = result.report.facts["onnxruntime"]
    assert (facts["quantized"], facts["integer"]) == (1, 1)
    assert result.report.artifact_rows()[0].error.relative < 0.02  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "head",
    [lambda x, w: x @ w.t(), lambda x, w: x.matmul(w.T), lambda x, w: torch.einsum("bd,vd->bv", x, w)],
)
def test_a_table_is_stored_once_whatever_way_it_is_multiplied(head: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(ROWS, FEATURES)

        def forward(self, ids: Tensor) -> Tensor:
            return head(self.table(ids).sum(1), self.table.weight)

    ids = torch.randint(0, ROWS, (64, 7), generator=torch.Generator().manual_seed(2))
    result = graphopt.optimize(Tied().eval(), ids, "int8", bench=False, cache=False)
    (stored,) = [tensor for tensor in result.program.state_dict().values() if tensor.numel() > ROWS]
    said = [refusal.reason for _, refusal in result.report.refusals if refusal.site == "table"]
    if stored.dtype is torch.int8:
        assert said == []
    else:
        assert said == ["`einsum` reads its table as floats, which would lie beside the integers"]


def test_a_table_stays_whose_head_is_to_stay() -> None:
    plan = plan_of(capture(words(tied=True), IDS), skip=("head",))
    assert plan.tables == ()
    assert "`linear` reads its table as floats, which would lie beside the integers" in {
        r.reason for r in plan.refusals
    }


def test_a_bag_says_what_makes_it_smaller() -> None:
    result = graphopt.optimize(nn.EmbeddingBag(ROWS, FEATURES).eval(), IDS, "int8", lower=False, cache=False)
    (refusal,) = [refusal for _, refusal in result.report.refusals]
    assert (refusal.site, refusal.kind) == ("embedding_bag", "bags of floats")
    assert "nn.Embedding and a sum" in refusal.reason  # which the test before this one does


def test_tables_alone_need_no_data() -> None:
    result = graphopt.optimize(words(), IDS, "int8:skip=head", bench=False, cache=False)
    assert result.artifact.size < 1.4 * ROWS * FEATURES * 5  # the head in float, the table in a quarter


def test_what_stays_float_says_why() -> None:
    program = capture(words(), IDS)
    assert reason(program, TensorRTBackend().description) == "the target reads no stored integers by rows"
    assert reason(program, skip=("table", "head")) == "left float as asked (skip=table)"
    assert reason(capture(words().double(), IDS)) == "its table is float64, not float32"
    spread = words()
    assert isinstance(spread, Words)
    with torch.no_grad():
        spread.table.weight[:, 0] = 1e3
    assert reason(capture(spread, IDS)).startswith("8 bits a row leave it ")
    with torch.no_grad():
        spread.table.weight[5, 0] = torch.nan
    assert reason(capture(spread, IDS)) == "its table holds NaN or infinite values"


def test_a_small_table_is_left_without_a_word() -> None:
    plan = plan_of(capture(words(rows=100), IDS % 100))
    assert not plan.tables
    assert not [refusal for refusal in plan.refusals if refusal.site.startswith("embedding")]


def test_a_table_that_is_computed_stays() -> None:
    class Computed(Words):
        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.embedding(ids, self.head.weight * ids.sum())

    assert reason(capture(Computed().eval(), IDS), skip=()) == "its table is computed at run time"


def test_rows_of_zeros_and_of_any_size_keep_their_digits() -> None:
    model = words()
    assert isinstance(model, Words)
    with torch.no_grad():
        model.table.weight[1] = 0
        model.table.weight[2] *= 1e-6
        model.table.weight[3] *= 1e6
    program = capture(model, IDS)
    result = Int8(Int8Options(skip=("head",))).apply(program, plan_of(program))
    for row in range(4):
        wanted, found = model.table.weight[row].detach(), result(torch.full((1, 1), row))[0][0, 0] / 2
        assert float((found - wanted).abs().max()) <= float(wanted.abs().max()) / 253


def test_a_target_may_have_no_tables() -> None:
    assert not plan_of(capture(words(), IDS), replace(TARGET, table=None)).tables
