"""half and bfloat16: casts where computing in 16 bits begins and ends, and what must stay in float32."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

import graphopt
from graphopt.backends.onnxruntime import OnnxRuntimeBackend
from graphopt.backends.tensorrt import TensorRTBackend, engine
from graphopt.capturing.capture import capture
from graphopt.errors import DataError, LoweringError, UsageError
from graphopt.ir.invariants import check_invariants
from graphopt.ir.program import Program
from graphopt.passes.fold import Fold
from graphopt.passes.half import BFloat16, Half, HalfPlan
from graphopt.pipeline.context import Context
from graphopt.targets.description import TargetDescription
from graphopt.testing import TensorSamples, assert_same_program, check_pass
from tests.models import GroupedQuery, UNet, example
from tests.passes.int8_models import folded, noise, quantized, reasons

COMPUTES, STORES = TensorRTBackend().description, OnnxRuntimeBackend().description
needs_parser = pytest.mark.skipif(not engine.available(), reason="the extra graphopt[tensorrt] is not installed")
HALF, WIDE = torch.float16, torch.float32


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(7, 6, batch_first=True), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


class Call(nn.Module):
    """A function of a linear layer's output."""

    def __init__(self, function: Callable[..., Tensor], width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.head, self._function = nn.Linear(width, width), nn.Linear(width, width), function

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return self._function(self.fc(x), *others)


def planned(
    program: Program,
    *data: Tensor,
    target: TargetDescription = COMPUTES,
    kind: type[Half] = Half,
    **options: object,
) -> HalfPlan:
    ctx = Context(program, targets=(target,), target=target, samples=TensorSamples(data) if data else None)
    return kind(kind.options_type(**options)).plan(program, ctx)


def halved(program: Program, *data: Tensor, kind: type[Half] = Half, **options: object) -> Program:
    return kind().apply(program, planned(program, *data, kind=kind, **options))


def of(function: Callable[..., Tensor], *others: Tensor) -> tuple[Program, tuple[Tensor, ...]]:
    inputs = (noise(3, 4, 4), *others)
    return folded(Call(function), *inputs), inputs


def test_casts_stand_where_computing_in_16_bits_begins_and_ends() -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 6, bias=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.a(x).relu()
            return self.b(y.softmax(-1)), y + self.b(y)

    class Expected(Given):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = F.linear(x.to(HALF), self.a.weight, self.a.bias).relu()
            weights = y.to(WIDE).softmax(-1).to(HALF)
            return F.linear(weights, self.b.weight).to(WIDE), (y + F.linear(y, self.b.weight)).to(WIDE)

    x = noise(3, 4)
    found = check_pass(Half(), Given().eval(), x, data=(noise(40, 4),), target=COMPUTES)
    expected = capture(Expected().half().eval(), (x,))
    expected = Fold().apply(expected, Fold().plan(expected, Context(expected)))  # the casts' assertions go
    assert_same_program(found.after, expected)
    assert reasons(found.plan) == {"softmax": "it sums exponentials"}  # type: ignore[arg-type]
    assert found.plan.notes == ()


@functools.cache
def in_float32(model: type[nn.Module]) -> tuple[Program, Tensor, Tensor]:
    """Return a folded program, its input, and what it gives in float64."""
    torch.manual_seed(0)
    module, x = model().float(), noise(2, 3, 7).double() if model is Steps else example(model)
    inputs = x.float() if x.is_floating_point() else x
    program = folded(module, inputs)
    return program, inputs, module.double()(x).detach()


def error(found: Program, inputs: Tensor, wanted: Tensor) -> float:
    return float((found(inputs).detach() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize(("model", "kind"), [(GroupedQuery, Half), (GroupedQuery, BFloat16), (Steps, Half)])
def test_what_is_computed_is_off_by_what_the_type_rounds(model: type[nn.Module], kind: type[Half]) -> None:
    program, inputs, wanted = in_float32(model)
    found = halved(program, kind=kind)
    check_invariants(program, found, kind.name)
    # a dozen roundings, each of half an eps, of values as large as the results
    assert error(found, inputs, wanted) < 6 * torch.finfo(kind.dtype).eps
    assert {t.dtype for t in found.state_dict().values() if t.dim() > 1} == {kind.dtype}


def test_tied_weights_are_stored_once_and_frozen_ones_stay_frozen() -> None:
    model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 30, bias=False))
    model[1].weight = model[0].weight
    model[0].weight.requires_grad = False
    program = halved(capture(model.eval(), (torch.arange(6).view(2, 3),)))
    (weight,) = {id(p): p for p in program.parameters()}.values()
    assert weight.dtype is HALF
    assert not weight.requires_grad


def test_a_weight_that_a_float32_call_reads_too_stays_float32() -> None:
    model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 30, bias=False)).eval()
    model[1].weight = model[0].weight
    ids = torch.arange(6).view(2, 3)
    program = capture(model, (ids,))
    after = halved(program, skip=("1",))
    assert [p.dtype for p in after.parameters()] == [WIDE]
    torch.testing.assert_close(after(ids), program(ids), rtol=2e-3, atol=2e-3)


LOWEST = torch.finfo(WIDE).min
MASKED = torch.tensor([[0.0, 0, LOWEST, LOWEST], [LOWEST] * 4, [0.0] * 4, [-math.inf, 0, 0, 0]])


def _added(y: Tensor, mask: Tensor) -> Tensor:
    return (y @ y.mT + mask.to(y.dtype)).softmax(-1) @ y


def _computed(y: Tensor, mask: Tensor) -> Tensor:
    return (y @ y.mT + (1.0 - mask) * LOWEST).softmax(-1) @ y


def _filled(y: Tensor, mask: Tensor) -> Tensor:
    return (y @ y.mT).masked_fill(mask < 0, LOWEST).softmax(-1) @ y


def _fused(y: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(y, y, y, attn_mask=mask)


@pytest.mark.parametrize(
    ("function", "kind"),
    [(_added, Half), (_computed, Half), (_filled, Half), (_fused, Half), (_computed, BFloat16), (_fused, BFloat16)],
)
def test_rows_that_are_masked_whole_give_no_nan(function: Callable[..., Tensor], kind: type[Half]) -> None:
    mask = torch.tensor([[1.0, 1, 0, 0], [0.0] * 4, [1.0] * 4, [0.0, 1, 1, 1]]) if function is _computed else MASKED
    program, inputs = of(function, mask)
    found = halved(program, kind=kind)
    wanted, result = program(*inputs).detach(), found(*inputs).detach()
    assert bool(wanted.isfinite().all())
    assert bool(result.isfinite().all())
    rows = [0, 2, 3] if function is _fused else slice(None)  # what a row makes of nothing is up to the kernel
    assert float((result - wanted)[:, rows].abs().max()) < 8 * torch.finfo(kind.dtype).eps * float(wanted.abs().max())
    assert any(node.meta["val"].dtype is kind.dtype for node in found.graph.nodes if node.op == "call_function")


DIVIDED = {
    "an epsilon is added": lambda y: y / (y.norm(dim=-1, keepdim=True) + 1e-12),
    "an epsilon is the least": lambda y: F.normalize(y, dim=-1),
    "an epsilon is below a root": lambda y: y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-12),
}


@pytest.mark.parametrize("case", DIVIDED)
def test_what_an_epsilon_keeps_from_zero_is_not_divided_by_in_half(case: str) -> None:
    inputs = noise(3, 4, 4)
    inputs[1] = 0
    model = Call(DIVIDED[case]).eval()
    nn.init.zeros_(model.fc.bias)
    program = capture(model, (inputs,))
    found = halved(program, inputs)
    assert bool(found(inputs).isfinite().all())
    torch.testing.assert_close(found(inputs), program(inputs), rtol=4e-3, atol=4e-3)
    assert any("small numbers" in r.counted_as or "large numbers" in r.counted_as for r in planned(program).refusals)


def test_whole_numbers_keep_their_digits() -> None:
    program, (x, places) = of(lambda y, places: y + torch.sin(places.float()[:, None] * 0.7), torch.tensor([5001] * 4))
    plan = planned(program)
    assert "sin" in reasons(plan)  # type: ignore[arg-type]
    torch.testing.assert_close(halved(program)(x, places), program(x, places), rtol=4e-3, atol=4e-3)
    added, inputs = of(lambda y, counts: y * counts.to(torch.float32), torch.tensor([4097.0] * 4).long())
    assert "whole numbers lose digits" in reasons(planned(added))["mul"]  # type: ignore[arg-type]
    torch.testing.assert_close(halved(added)(*inputs), added(*inputs), rtol=2e-3, atol=2)


def test_casts_that_the_model_makes_itself_stay_right() -> None:
    def function(y: Tensor, other: Tensor, flags: Tensor) -> Tensor:
        wide = y.to(torch.float64).sum(-1, keepdim=True).to(torch.float32)
        return (y * flags.type_as(y) + other.to(torch.float32).type_as(y) + wide) @ y.float() / 8

    program, inputs = of(function, noise(4, 4).half(), torch.tensor([[True, False, True, True]]))
    found = halved(program)
    wanted = program(*inputs).detach()
    assert float((found(*inputs).detach() - wanted).abs().max()) < 6 * torch.finfo(HALF).eps * float(wanted.abs().max())
    casts = [node for node in found.graph.nodes if node.target is torch.ops.aten.to.dtype]
    doubled = [n for n in casts if n.args[0] in casts and {n.args[1], n.args[0].args[1]} == {HALF, WIDE}]
    assert doubled == []


def weighted(values: Callable[[Tensor], Tensor]) -> dict[str, str]:
    model = Call(lambda y: y.relu()).eval()
    model.fc.weight.data = values(model.fc.weight.data)
    return reasons(planned(capture(model, (noise(2, 4),))))  # type: ignore[arg-type]


def test_weights_beyond_the_range_stay_float32_with_their_figures() -> None:
    large = weighted(lambda w: w.fill_diagonal_(-7e4))
    assert large["linear"] == "float16 cannot hold `fc.weight`: -7e+04 is beyond 65504"
    small = weighted(lambda w: w * 1e-8)
    assert "of 16 values become 0, the rest loses digits below 6.1e-05" in small["linear"]
    assert weighted(lambda w: torch.where(torch.arange(4)[:, None] == 0, 1e-9, w)) == {}  # a dead channel is no loss


def test_values_that_reach_half_of_the_range_stay_float32_with_their_figures() -> None:
    program, (x,) = of(lambda y: (y * y * 1000).relu())
    plan = planned(program, 10 * x)
    assert reasons(plan)["mul_1"].startswith("`mul_1` reached ")  # type: ignore[arg-type]
    assert "32752 leaves room for other samples" in reasons(plan)["mul_1"]  # type: ignore[arg-type]
    assert bool(halved(program, 10 * x)(100 * x).isfinite().all())
    (said,) = planned(program).notes
    assert said == "without data it was not checked whether values overflow (beyond 65504)"
    assert planned(program, kind=BFloat16).notes == ()
    with pytest.raises(DataError, match="NaN"):
        planned(program, torch.full_like(x, math.nan))


def test_moved_values_are_measured_where_they_are_computed() -> None:
    program, (x,) = of(lambda y: (y.pow(2).sum(-1, keepdim=True) * 1e4).transpose(1, 2) @ y)
    assert "`transpose` reached" in reasons(planned(program, 10 * x))["matmul"]  # type: ignore[arg-type]


def test_skip_and_keep() -> None:
    program, _ = of(lambda y: F.gelu(y) @ y)
    assert reasons(planned(program, skip=("fc",)))["linear"] == "left float as asked (skip=fc)"  # type: ignore[arg-type]
    kept = planned(program, keep=("gelu",))
    assert reasons(kept) == {"gelu": "it computes in float32 as asked (keep=gelu)"}  # type: ignore[arg-type]
    assert kept.computed == ("linear", "matmul")
    for option, near in (("skip", "fcc"), ("keep", "gello")):
        with pytest.raises(UsageError, match=f"`{option}={near}` matches no .* Did you mean"):
            planned(program, **{option: (near,)})


def test_regions_and_values_written_in_place_are_left_with_the_reason() -> None:
    def function(y: Tensor) -> Tensor:
        joined = y.new_zeros(3, 4, 8)
        joined[..., :4] = y
        z = torch.cond(y.sum() > 0, lambda a: a * 2, lambda a: a - 1, (y,))
        return joined @ torch.cat([z, z], -1).mT

    program, inputs = of(function)
    plan = planned(program)
    assert reasons(plan)["cond"] == "it is a region, which computes in float32"  # type: ignore[arg-type]
    assert any("shares memory" in text or "in place" in text for text in reasons(plan).values())  # type: ignore[arg-type]
    torch.testing.assert_close(halved(program)(*inputs), program(*inputs), rtol=8e-3, atol=8e-3)


def test_integers_keep_scales_of_float32() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4))
    program, _ = quantized(model, noise(32, 16), target=COMPUTES)
    plan = planned(program)
    assert {r.counted_as for r in plan.refusals} == {"next to integers"}
    left, _ = quantized(model, noise(32, 16), target=COMPUTES)
    assert plan.computed == () or halved(left)(noise(2, 16)).shape == (2, 4)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.mix, self.head = nn.Embedding(300, 64), nn.Linear(64, 64), nn.Linear(64, 300)
        self.second, self.back = nn.Linear(64, 256), nn.Linear(256, 64)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.back(self.second(self.mix(self.table(ids))).relu()))


def test_a_runtime_without_kernels_gets_weights_of_half_the_bytes(tmp_path: Path) -> None:
    ids = torch.randint(0, 300, (2, 5), generator=torch.Generator().manual_seed(0))
    program = capture(Words().eval(), (ids,))
    plan = planned(program, target=STORES)
    assert plan.computed == ()
    assert plan.weights == ("head.weight", "second.weight", "back.weight")
    assert "int8 is" in plan.notes[0]
    after = Half().apply(program, plan)
    backend = OnnxRuntimeBackend()
    stored = backend.lower(after, tmp_path / "onnxruntime.onnx")
    assert stored.size < 0.6 * sum(parameter.nbytes for parameter in program.parameters())
    assert backend.verify(stored, after) < 1e-5
    (found,) = stored.session()(ids[:1].numpy())  # another batch size
    assert float((torch.from_numpy(found) - program(ids[:1]).detach()).abs().max()) < 2 * torch.finfo(HALF).eps
    small = planned(program, target=STORES, skip=("back",))
    assert {r.site: r.reason for r in small.refusals} == {"back.weight": "left float as asked (skip=back)"}


def test_a_model_of_small_weights_is_told_so() -> None:
    plan = planned(of(torch.relu)[0], target=STORES)
    assert {r.site: r.reason for r in plan.refusals} == {
        "the program": "none of its 2 weights has more than 8192 numbers"
    }


class Untouchable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("it was run")


def test_a_target_without_the_type_is_refused_before_anything_runs() -> None:
    said = "`bfloat16` is not for onnxruntime, which has no bfloat16 kernels. Leave it out, use `half`, or store"
    with pytest.raises(LoweringError, match=said):
        graphopt.optimize(Untouchable(), torch.zeros(4, 2), passes=[BFloat16()])
    with pytest.raises(LoweringError, match=said):
        planned(of(torch.relu)[0], target=STORES, kind=BFloat16)
    assert planned(of(torch.relu)[0], target=STORES, kind=BFloat16, compute="yes").computed == ("linear", "relu")


@needs_parser
@pytest.mark.parametrize("kind", [Half, BFloat16])
def test_tensorrt_builds_it_and_its_stand_in_computes_the_same(kind: type[Half], tmp_path: Path) -> None:
    program, _, _ = in_float32(UNet)
    plan = planned(program, kind=kind)
    after = kind().apply(program, plan)
    backend = TensorRTBackend()
    artifact = backend.lower(after, tmp_path / "tensorrt.onnx")
    assert str(artifact.facts["engine"]).startswith("built by")
    assert backend.check(artifact) == []
    assert backend.verify(artifact, after) < torch.finfo(kind.dtype).eps
    script = backend.run_script(artifact)
    assert ("ONNX Runtime has no bfloat16 kernels" in script) == (kind is BFloat16)
    left = [reason for reason in reasons(plan).values() if "no kernel" in reason]  # type: ignore[arg-type]
    assert left == ([] if kind is Half else ["tensorrt has no kernel of it in bfloat16"])


class Table(nn.Module):
    """A table of which rows are looked up in 16 bits, and cut out in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.table(ids), self.table.weight[ids]


def test_the_stand_in_rounds_a_weight_that_is_rounded_where_it_is_read(tmp_path: Path) -> None:
    program = capture(Table().eval(), (torch.randint(0, 20, (2, 5)),))
    plan = planned(program, kind=BFloat16)
    assert plan.weights == ()
    after = BFloat16().apply(program, plan)
    backend = TensorRTBackend()
    assert backend.verify(backend.lower(after, tmp_path / "tensorrt.onnx"), after) == 0


@needs_parser
def test_places_of_equal_values_may_be_either(tmp_path: Path) -> None:
    class Segmented(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).argmax(1)

    images = noise(2, 3, 32, 32)
    after = halved(folded(Segmented(), images))
    backend = TensorRTBackend()
    assert backend.verify(backend.lower(after, tmp_path / "tensorrt.onnx"), after, (noise(8, 3, 32, 32).numpy(),)) == 0
