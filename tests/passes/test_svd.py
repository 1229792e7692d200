"""Low-rank factors: exact error by Eckart and Young, refusals with reasons, the same bytes again."""

from __future__ import annotations

import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.backends.onnxruntime import OnnxRuntimeBackend
from graphopt.capturing.capture import capture
from graphopt.errors import DataError, PassError, UsageError
from graphopt.ir.program import Program
from graphopt.ir.provenance import origin
from graphopt.passes import svd
from graphopt.passes.factorisation.low_rank import Decomposition, decompose, shrunk
from graphopt.passes.fold import Fold
from graphopt.passes.svd import Svd, SvdOptions, SvdPlan
from graphopt.pipeline.context import Context
from graphopt.pipeline.options import build
from graphopt.quantization.formats import IntegerFormat
from graphopt.statistics import covariance as covariances
from graphopt.statistics.covariance import Covariance
from graphopt.targets.description import TargetDescription
from graphopt.testing import TensorSamples, assert_same_program, check_pass, run_pass
from tests.models import TiedWeights, example

DOUBLE = 1e-12  # float64 rounding over a few hundred terms


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator)
    return model


def plan_of(options: SvdOptions, program: Program, data: Tensor | None = None, multiple: int = 1) -> SvdPlan:
    samples = TensorSamples((data,)) if data is not None else None
    return Svd(options).plan(program, Context(original=program, samples=samples, targets=(target(multiple),)))


def target(multiple: int) -> TargetDescription:
    form = IntegerFormat(8)
    return TargetDescription("made", opset=20, activation=form, weight=form, rank_multiple=multiple)


def reasons(plan: SvdPlan) -> dict[str, str]:
    return {refusal.site: refusal.reason for refusal in plan.refusals}


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Pointwise(nn.Module):
    def __init__(self, stride: int = 1, groups: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 24, 1, stride=stride, groups=groups, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Gpt2Projection(nn.Module):
    """A linear layer as GPT-2 writes it: weight (in, out), addmm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(24, 16))
        self.bias = nn.Parameter(torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.zeros(24, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.mixing


# Given / Expected


def test_a_linear_layer_becomes_two() -> None:
    class Expected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v = nn.Linear(24, 4, bias=False)
            self.u = nn.Linear(4, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.u(self.v(x))

    found = run_pass(Svd(SvdOptions(rank=4)), seeded(Wide()), noise(2, 24))
    assert_same_program(found, capture(Expected(), noise(2, 24)), compare_tensors=False)
    assert set(found.state_dict()) == {"fc.u.weight", "fc.v.weight", "fc.bias"}


def test_a_strided_convolution_keeps_its_stride_on_the_first_factor() -> None:
    class Expected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v = nn.Conv2d(16, 4, 1, stride=2, bias=False)
            self.u = nn.Conv2d(4, 24, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.u(self.v(x))

    x = noise(2, 16, 6, 6)
    found = run_pass(Svd(SvdOptions(rank=4)), seeded(Pointwise(stride=2)), x)
    assert_same_program(found, capture(Expected(), x), compare_tensors=False)


def test_gpt2_layout_is_kept() -> None:
    found = run_pass(Svd(SvdOptions(rank=4)), seeded(Gpt2Projection()), noise(2, 24))
    shapes = {name: tuple(t.shape) for name, t in found.state_dict().items()}
    assert shapes == {"v.weight": (24, 4), "u.weight": (4, 16), "bias": (16,)}
    assert [n.target for n in found.graph.nodes if n.op == "call_function"] == [
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
    ]


def test_a_weight_of_another_name_gives_readable_factors() -> None:
    found = run_pass(Svd(SvdOptions(rank=4)), seeded(Product()), noise(2, 3, 24))
    assert set(found.state_dict()) == {"mixing_u", "mixing_v"}


def test_new_nodes_say_who_made_them_and_from_what() -> None:
    found = run_pass(Svd(SvdOptions(rank=4)), seeded(Wide()), noise(2, 24))
    for node in found.graph.nodes:
        if node.op == "call_function":
            known = origin(node)
            assert known is not None
            assert (known.node, known.module, known.made_by, known.site) == ("linear", "fc", "svd", "fc.weight")


# Refusals


def test_a_tied_weight_is_refused() -> None:
    model = TiedWeights()
    plan = plan_of(SvdOptions(rank=1, min_rank=1), capture(model, example(model)))
    assert any("its weight is shared with `embedding`" in reason for reason in reasons(plan).values())


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Pointwise(groups=2), "the convolution has 2 groups"),
        (Pointwise(padding=1), "the convolution pads its input"),
    ],
)
def test_convolutions_that_do_not_factorise_are_refused(model: nn.Module, reason: str) -> None:
    plan = plan_of(SvdOptions(rank=1, min_rank=1), capture(seeded(model), noise(2, 16, 6, 6)))
    assert not plan.sites
    assert reasons(plan) == {"conv.weight": reason}


def test_a_computed_weight_is_refused_until_it_is_folded() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(24, 16))
    program = capture(model, noise(2, 24))
    plan = plan_of(SvdOptions(rank=4), program)
    assert reasons(plan) == {
        "linear": "its weight is computed from stored tensors by `_weight_norm`: put fold before, which stores it"
    }
    assert plan_of(SvdOptions(rank=4), run_pass(Fold(), program, ())).sites == ("weight",)


def test_only_layers_that_could_be_factorised_are_refused_for_a_computed_weight() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
            self.weight, self.bias = nn.Parameter(torch.randn(4, 16)), nn.Parameter(torch.randn(16))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, self.conv(x).mean((2, 3)), self.weight * 2)

    plan = plan_of(SvdOptions(rank=2), capture(Computed(), noise(2, 3, 6, 6)))
    assert reasons(plan) == {
        "addmm": "its weight is computed from stored tensors by `mul`: put fold before, which stores it"
    }


@pytest.mark.parametrize(
    ("form", "site", "reason"),
    [
        ("bias", "linear", "its bias is computed at run time by `mean`"),
        ("alpha", "addmm", "its product or its bias is multiplied by a factor (alpha, beta)"),
        ("input", "linear", "its input is stored"),
    ],
)
def test_no_layer_goes_missing_without_a_line(form: str, site: str, reason: str) -> None:
    class Form(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.input = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(2, 16))
            self.bias = nn.Parameter(torch.randn(16))

        def forward(self, x: Tensor) -> Tensor:
            if form == "bias":
                return nn.functional.linear(x, self.weight, x.mean(0))
            if form == "alpha":
                return torch.addmm(self.bias, x, self.weight, alpha=2)
            return nn.functional.linear(self.input, self.weight).sum() + x

    plan = plan_of(SvdOptions(rank=2), capture(Form(), noise(4, 16)))
    assert reasons(plan) == {site: reason}


def test_a_rank_that_saves_nothing_is_refused() -> None:
    plan = plan_of(SvdOptions(rank=10), capture(seeded(Wide()), noise(2, 24)))
    assert not plan.sites
    assert reasons(plan) == {"fc.weight": "rank 10 of 16 saves nothing"}


def test_a_small_saving_is_refused_when_the_rank_was_found_not_asked_for() -> None:
    program = capture(seeded(Wide()), noise(2, 24))
    plan = plan_of(SvdOptions(energy=0.1, min_rank=8), program)
    assert reasons(plan) == {"fc.weight": "rank 8 of 16 saves 17% of its parameters, less than min_saving=0.25"}
    assert plan_of(SvdOptions(rank=8), program).sites == ("fc.weight",)


@pytest.mark.parametrize(
    ("value", "reason"), [(0.0, "its weight is zero"), (math.nan, "its weight holds NaN or infinite values")]
)
def test_weights_without_singular_values_are_refused(value: float, reason: str) -> None:
    model = Wide()
    program = capture(model, noise(2, 24))
    dict(program.graph_module.named_parameters())["fc.weight"].data.fill_(value)
    assert reasons(plan_of(SvdOptions(rank=4), program)) == {"fc.weight": reason}


def test_skipped_weights_are_named() -> None:
    plan = plan_of(SvdOptions(rank=4, skip=("f?.*",)), capture(Wide(), noise(2, 24)))
    assert reasons(plan) == {"fc.weight": "`skip=f?.*` names it"}


def test_a_convolution_with_a_window_is_no_site() -> None:
    plan = plan_of(SvdOptions(rank=4), capture(nn.Conv2d(16, 16, 3), noise(2, 16, 6, 6)))
    assert plan.summary() == "matched 0, rewrote 0"


LEAST = "ranks are multiples of {}, 4 at least"


@pytest.mark.parametrize(
    ("options", "multiple", "said"),
    [
        (
            {"ratio": 0.9},
            16,
            f"rank 16 removes 50.0% of its parameters, not 90.0%: {LEAST.format(16)}",
        ),
        ({"ratio": 0.9}, 1, f"rank 4 removes 87.5% of its parameters, not 90.0%: {LEAST.format(1)}"),
        ({"ratio": 0.9, "min_rank": 1}, 1, None),
        ({"ratio": 0.5}, 16, None),
        ({"rank": 10}, 16, "rank 16, not 10: ranks are multiples of 16, 4 at least"),
        ({"rank": 2}, 1, "rank 4, not 2: ranks are multiples of 1, 4 at least"),
        ({"rank": 16}, 16, None),
        ({"energy": 0.3}, 8, None),
    ],
)
def test_what_could_not_be_done_as_asked_is_said(options: dict[str, Any], multiple: int, said: str | None) -> None:
    plan = plan_of(SvdOptions(**options), capture(seeded(nn.Linear(64, 64)), noise(2, 64)), multiple=multiple)
    assert plan.sites == ("weight",)
    assert reasons(plan).get("weight") == said


def test_a_layer_too_wide_for_its_covariance_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.passes.svd.WIDEST", 32)
    plan = plan_of(SvdOptions(rank=16), capture(seeded(nn.Linear(64, 64)), noise(2, 64)), noise(64, 64))
    assert reasons(plan) == {"weight": "factorised without regard to the data: 64 inputs, more than 32"}


def test_two_ways_to_choose_a_rank_are_a_usage_error() -> None:
    with pytest.raises(UsageError, match="rank and ratio both choose the rank"):
        build("svd", SvdOptions, {"rank": "4", "ratio": "0.5"})


def test_a_plan_of_another_program_is_refused() -> None:
    plan = plan_of(SvdOptions(rank=4), capture(seeded(Wide()), noise(2, 24)))
    with pytest.raises(PassError, match="The plan belongs to another program"):
        Svd().apply(capture(seeded(Pointwise()), noise(2, 16, 6, 6)), plan)


def test_data_that_is_not_finite_is_a_data_error() -> None:
    with pytest.raises(DataError, match="Calibration batch 0 holds NaN"):
        plan_of(SvdOptions(rank=4), capture(Wide(), noise(2, 24)), torch.full((8, 24), math.nan))


# At the edges


def test_a_layer_whose_input_and_output_are_the_programs() -> None:
    checked = check_pass(Svd(SvdOptions(rank=4)), seeded(Wide()), noise(2, 24))
    assert checked.after(noise(5, 24)).shape == (5, 16)


def test_a_bias_that_somebody_else_reads_is_copied() -> None:
    class SharedBias(Wide):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * self.fc.bias

    data = noise(64, 24, seed=3) + 2
    checked = check_pass(Svd(SvdOptions(rank=4)), seeded(SharedBias()), noise(2, 24), data=[data])
    state, before = checked.after.state_dict(), checked.before.state_dict()
    assert torch.equal(state["fc.bias"], before["fc.bias"])
    assert not torch.equal(state["fc.bias_own"], before["fc.bias"])


def test_the_result_stays_trainable() -> None:
    found = run_pass(Svd(SvdOptions(rank=4)), seeded(Wide()), noise(2, 24)).copy(share_tensors=False)
    found(noise(2, 24)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in found.parameters())


# Ranks


def test_ratio_is_the_share_of_parameters_removed_at_least() -> None:
    plan = plan_of(SvdOptions(ratio=0.5), capture(seeded(Wide()), noise(2, 24)))
    before, after = plan.layers["fc.weight"]["parameters"]  # type: ignore[misc]
    assert (plan.layers["fc.weight"]["rank"], before, after) == (4, 384, 160)
    assert after <= 0.5 * before < after + 2 * (24 + 16)  # one more would break the promise


def test_energy_chooses_the_smallest_rank_that_keeps_it() -> None:
    model = Wide()
    q, _ = torch.linalg.qr(noise(16, 16, dtype=torch.float64))
    r, _ = torch.linalg.qr(noise(24, 16, seed=1, dtype=torch.float64))
    values = torch.tensor([4.0, 3.0, 2.0, 1.0] + [0.0] * 12, dtype=torch.float64)  # squares 16, 9, 4, 1 of 30
    model.fc.weight.data = ((q * values) @ r.T).float()
    program = capture(model, noise(2, 24))
    options = {25 / 30 - 1e-3: 2, 25 / 30 + 1e-3: 3, 29 / 30 + 1e-3: 4}
    for energy, rank in options.items():
        assert plan_of(SvdOptions(energy=energy, min_rank=1), program).layers["fc.weight"]["rank"] == rank


def test_ranks_are_rounded_to_what_every_target_likes_unless_told_otherwise() -> None:
    program = capture(seeded(nn.Linear(64, 64)), noise(2, 64))
    assert plan_of(SvdOptions(rank=9), program, multiple=8).layers["weight"]["rank"] == 16
    assert plan_of(SvdOptions(rank=9, round_to=4), program, multiple=8).layers["weight"]["rank"] == 12
    assert plan_of(SvdOptions(ratio=0.5), program, multiple=6).layers["weight"]["rank"] == 12  # 16 rounded down


# Meaning: Eckart and Young


@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 11), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_error_is_exactly_the_singular_values_left_out(outputs: int, inputs: int, rank: int, seed: int) -> None:
    weight = noise(outputs, inputs, seed=seed, dtype=torch.float64)
    rank = min(rank, outputs, inputs)
    parts = decompose(weight, None, has_bias=False)
    u, v = parts.factors(rank)
    left_out = torch.linalg.svdvals(weight)[rank:]
    residual = weight - u @ v
    frobenius = float(torch.linalg.matrix_norm(residual))
    spectral = float(torch.linalg.matrix_norm(residual, 2))
    assert frobenius == pytest.approx(float(left_out.norm()), abs=DOUBLE)
    assert spectral == pytest.approx(float(left_out[0]) if len(left_out) else 0.0, abs=DOUBLE)
    assert parts.error(rank) * float(weight.norm()) == pytest.approx(frobenius, abs=DOUBLE)


@pytest.mark.parametrize("has_bias", [False, True])
def test_with_data_the_planned_error_is_that_of_the_outputs(has_bias: bool) -> None:
    inputs = noise(400, 12, dtype=torch.float64) @ noise(12, 12, seed=1, dtype=torch.float64) + 3
    weight = noise(10, 12, seed=2, dtype=torch.float64)
    covariance = Covariance(axis=1)
    covariance.update(inputs)
    parts = decompose(weight, covariance, has_bias=has_bias)
    u, v = parts.factors(4)
    moments = covariance.about_mean() if has_bias else covariance.about_zero()
    whitening = torch.linalg.cholesky(shrunk(moments, covariance.rows))
    wanted = float(
        torch.linalg.matrix_norm((weight - u @ v) @ whitening) / torch.linalg.matrix_norm(weight @ whitening)
    )
    assert parts.error(4) == pytest.approx(wanted, rel=1e-9)


def test_data_makes_the_outputs_better_than_no_data() -> None:
    program = capture(seeded(Wide()).double(), noise(2, 24, dtype=torch.float64))
    mixing = noise(24, 24, seed=5, dtype=torch.float64) * torch.logspace(0, -2, 24, dtype=torch.float64)
    seen = noise(512, 24, seed=6, dtype=torch.float64) @ mixing.T + 1
    unseen = noise(512, 24, seed=7, dtype=torch.float64) @ mixing.T + 1
    errors = []
    for data in (None, seen):
        plan = plan_of(SvdOptions(rank=4), program, data)
        found = Svd(SvdOptions(rank=4)).apply(program, plan)
        errors.append(float((found(unseen) - program(unseen)).detach().norm()))
    assert errors[1] < 0.5 * errors[0]


def test_the_bias_takes_in_the_mean_error() -> None:
    program = capture(seeded(Wide()).double(), noise(2, 24, dtype=torch.float64))
    data = noise(256, 24, seed=6, dtype=torch.float64) + 5
    found = Svd().apply(program, plan_of(SvdOptions(rank=4), program, data))
    mean_error = (found(data) - program(data)).mean(0)
    assert float(mean_error.detach().abs().max()) < 1e-9 * float(program(data).detach().abs().max())


def test_full_rank_directions_the_data_never_shows_are_not_thrown_away_for_free() -> None:
    covariance = Covariance(axis=1)
    covariance.update(noise(4, 16))  # 4 samples of 16 features
    assert float(torch.linalg.eigvalsh(shrunk(covariance.about_zero(), covariance.rows))[0]) > 0


def test_covariance_of_a_strided_convolution_counts_the_positions_it_reads() -> None:
    x = noise(2, 3, 4, 6, dtype=torch.float64)
    covariance = Covariance(axis=1, step=(2, 3))
    covariance.update(x[:1])
    covariance.update(x[1:])
    rows = x[:, :, ::2, ::3].permute(0, 2, 3, 1).reshape(-1, 3)
    torch.testing.assert_close(covariance.mean, rows.mean(0))
    torch.testing.assert_close(covariance.about_mean(), torch.cov(rows.T, correction=0))
    torch.testing.assert_close(covariance.about_zero(), rows.T @ rows / len(rows))


class Forked(nn.Module):
    """The shortcut reads the input with strides of its own, after the branch has been through."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(16, 24, 1), nn.Conv2d(24, 16, 1, stride=2)
        self.shortcut, self.last = nn.Conv2d(16, 16, 1, stride=2), nn.Linear(16, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run."""
        return self.last((self.two(self.one(x).relu()) + self.shortcut(x)).mean((2, 3)))


@pytest.mark.parametrize("options", [SvdOptions(rank=5), SvdOptions(), SvdOptions(ratio=0.4)])
def test_a_matrix_at_a_time_gives_what_all_at_once_give(options: SvdOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    program = capture(seeded(Forked()), noise(2, 16, 8, 8))
    ctx = Context(original=program).with_data(TensorSamples((noise(80, 16, 8, 8, seed=3),)))
    at_once = Svd(options).plan(program, ctx)
    monkeypatch.setattr(covariances, "peak_bytes_per_sample", lambda _: 0)
    held: list[weakref.ref[Covariance]] = []
    alive: list[int] = []

    def decomposed(weight: torch.Tensor, given: Covariance, **rest: Any) -> Decomposition:
        held.extend([] if any(given is one() for one in held) else [weakref.ref(given)])
        alive.append(sum(one() is not None and one().rows > 0 for one in held))
        return decompose(weight, given, **rest)

    monkeypatch.setattr(svd, "decompose", decomposed)
    one_by_one = Svd(options).plan(program, ctx)
    assert len(held) == 4
    assert set(alive) == {1}
    assert one_by_one.to_json() == at_once.to_json()
    assert [*one_by_one.tensors] == [*at_once.tensors]
    for name, tensor in at_once.tensors.items():
        assert torch.equal(one_by_one.tensors[name], tensor)


@pytest.mark.parametrize("bytes_of_values", [0, 1 << 40])
def test_values_that_are_not_finite_are_named_either_way(bytes_of_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covariances, "peak_bytes_per_sample", lambda _: bytes_of_values)
    program = capture(seeded(Wide()), noise(2, 24))
    data = noise(64, 24)
    data[40] = torch.inf
    with pytest.raises(DataError, match="Calibration batch 1 makes `x` NaN or infinite"):
        plan_of(SvdOptions(rank=4), program, data)


def test_signs_are_fixed() -> None:
    weight = noise(6, 5, dtype=torch.float64)
    one, other = decompose(weight, None, has_bias=False), decompose(-weight, None, has_bias=False)
    torch.testing.assert_close(one.right, other.right, atol=DOUBLE, rtol=0)
    assert bool((one.right.gather(1, one.right.abs().argmax(1, keepdim=True)) > 0).all())


@pytest.mark.parametrize("model", [Wide(), Gpt2Projection(), Product()])
def test_every_form_of_a_linear_layer_keeps_the_contract(model: nn.Module) -> None:
    checked = check_pass(Svd(SvdOptions(rank=4)), seeded(model), noise(2, 24), data=[noise(64, 24, seed=2)])
    assert len(checked.plan.sites) == 1


def test_a_low_rank_weight_is_recovered_exactly() -> None:
    model = seeded(Wide()).double()
    model.fc.weight.data = noise(16, 3, dtype=torch.float64) @ noise(3, 24, seed=1, dtype=torch.float64)
    x = noise(7, 24, dtype=torch.float64)
    checked = check_pass(Svd(), model, x)
    assert checked.plan.layers["fc.weight"]["rank"] == 4  # type: ignore[attr-defined]
    torch.testing.assert_close(checked.after(x), model(x), rtol=DOUBLE, atol=DOUBLE * 100)


# Through the backend


def test_lowered_factors_compute_what_the_program_does(tmp_path: Path) -> None:
    model = nn.Sequential(Pointwise(stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(216, 32))
    program = run_pass(Svd(SvdOptions(rank=4)), seeded(model), noise(2, 16, 6, 6))
    backend = OnnxRuntimeBackend()
    artifact = backend.lower(program, tmp_path / "model.onnx")
    backend.verify(artifact, program)
