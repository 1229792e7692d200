"""sparsify: which weights become zero, and that they stay so through training, folding, integers and files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.capturing.capture import capture
from graphopt.errors import DataError, UsageError
from graphopt.ir.program import Program
from graphopt.passes.sparsify import Sparsify, SparsifyOptions, SparsifyPlan
from graphopt.pipeline.context import Context
from graphopt.pipeline.options import build
from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.runner import run
from graphopt.testing import TensorSamples, check_pass
from tests.graphopt.distillation.models import ResidualNet, settled
from tests.passes.int8_models import WITHOUT_COSTS


class Net(nn.Module):
    """A convolution, a linear layer that is used twice, and a matrix whose products are tied to another operator."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 4)
        self.tied = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(self.linear(self.conv(x).relu().mean((2, 3))).relu())
        return self.head(x) @ self.tied + self.tied.sum()


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return capture(Net().eval(), torch.randn(2, 3, 8, 8))


@pytest.fixture(scope="module")
def samples() -> Tensor:
    return torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def plan_of(program: Program, data: Tensor | None = None, **options: object) -> SparsifyPlan:
    ctx = Context(original=program, samples=None if data is None else TensorSamples((data,)))
    return Sparsify(build("sparsify", SparsifyOptions, options)).plan(program, ctx)


def zeros(weight: Tensor) -> int:
    return int((weight == 0).sum())


def test_every_layer_loses_its_smallest_weights(program: Program) -> None:
    plan = plan_of(program, ratio=0.75)
    assert plan.sites == ("conv.weight", "linear.weight", "head.weight")
    assert plan.zeros == dict.fromkeys(plan.sites, 0.75)
    for name in plan.sites:
        before, after = program.state_dict()[name], plan.tensors[name]
        gone = before[after == 0].abs()
        assert float(gone.max()) <= float(after[after != 0].abs().min())
        assert torch.equal(after[after != 0], before[after != 0])
    assert plan.notes[0].startswith("75% of 312 weights are zero; no kernel of ONNX Runtime or TensorRT is faster")
    assert {one.site: one.reason for one in plan.refusals} == {"tied": "weight is shared with `sum_1`"}


def test_all_layers_together_lose_the_smallest_of_all_and_none_loses_all(program: Program) -> None:
    small = program.copy(share_tensors=False)
    with torch.no_grad():
        small.state_dict()["head.weight"].mul_(1e-3)
    plan = plan_of(small, ratio=0.5, scope="global")
    counts = {name: zeros(plan.tensors[name]) for name in plan.sites}
    assert sum(counts.values()) == 312 // 2 - 1  # the largest of the head stays
    assert counts["head.weight"] == 31


def test_weights_below_a_threshold_go_however_many_there_are(program: Program) -> None:
    plan = plan_of(program, threshold=0.1)
    for name in plan.sites:
        assert torch.equal(plan.tensors[name] == 0, program.state_dict()[name].abs() < 0.1)


def test_by_gradient_goes_what_outputs_miss_least(samples: Tensor) -> None:
    """Of a linear layer E (w g)^2 is w^2 E x^2, up to a factor: large weights of small inputs go first."""
    torch.manual_seed(0)
    program = capture(nn.Linear(16, 4).eval(), torch.randn(2, 16))
    spread = torch.logspace(-2, 1, 16)
    data = torch.randn(256, 16, generator=torch.Generator().manual_seed(1)) * spread
    weight = plan_of(program, data, ratio=0.5, by="gradient").tensors["weight"]
    expected = (program.state_dict()["weight"] * spread).abs()
    kept, gone = expected[weight != 0], expected[weight == 0]
    assert float(kept.mean()) > 10 * float(gone.mean())
    assert float((kept > gone.max()).double().mean()) > 0.8
    with pytest.raises(DataError, match=r"by=magnitude needs none"):
        plan_of(program, by="gradient")
    data[3, 3] = torch.nan
    for scope in ("layer", "global"):
        plan = plan_of(program, data, by="gradient", scope=scope)
        assert (plan.sites, [one.reason for one in plan.refusals]) == ((), ["its gradients are not finite"])


def of_kind(program: Program, like: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Return for sparse weights how many zeros there were and how many of them are zero now."""
    after = program.state_dict()
    return {name: (zeros(one), int(((one == 0) & (after[name] == 0)).sum())) for name, one in like.items()}


@pytest.fixture(scope="module")
def teacher(samples: Tensor) -> Program:
    torch.manual_seed(0)
    return capture(settled(ResidualNet(), samples), samples[:2])


def ran(passes: str, program: Program, samples: Tensor, original: Program | None = None) -> Program:
    ctx = Context(original=original or program, targets=(WITHOUT_COSTS,)).with_data(TensorSamples((samples,)))
    return run(Pipeline.parse(passes), program, ctx).programs[WITHOUT_COSTS.name]


def test_training_keeps_the_zeros_and_trains_the_rest(teacher: Program, samples: Tensor, tmp_path: Path) -> None:
    sparse = ran("sparsify:ratio=0.6", teacher, samples)
    names = [name for name, one in sparse.state_dict().items() if one.dim() > 1]
    sparse.save(tmp_path / "sparse.pt2")
    loaded = graphopt.load(tmp_path / "sparse.pt2")  # who says which zeros stay lies in the file
    pattern = ran("sparsity24:force=yes:ends=yes", teacher, samples)
    for start in (sparse, loaded, ran("fold", sparse, samples), pattern):
        trained = ran("recover:epochs=1:batch_size=16", start, samples, teacher)
        like = {name: start.state_dict()[name] for name in names}
        found = of_kind(trained, like)
        assert all(before == after for before, after in found.values())
        assert sum(before for before, _ in found.values()) > 500
        assert not torch.equal(trained.state_dict()["stem.weight"], start.state_dict()["stem.weight"])


def test_zeros_that_were_there_before_are_kept_where_they_are_as_many_as_asked(
    teacher: Program, samples: Tensor
) -> None:
    start = ran("sparsify:ratio=0.7", teacher, samples).copy(share_tensors=False)
    plain = teacher.copy(share_tensors=False)
    plain.graph_module.load_state_dict(start.state_dict())
    trained = ran("sparsify:ratio=0.6,recover:epochs=1:batch_size=16:lr=0.003", plain, samples, teacher)
    assert zeros(trained.state_dict()["layer1.conv1.weight"]) == zeros(start.state_dict()["layer1.conv1.weight"]) > 0


def test_zeros_that_no_pass_has_chosen_are_trained(teacher: Program, samples: Tensor) -> None:
    start = teacher.copy(share_tensors=False)
    with torch.no_grad():
        start.state_dict()["layer1.conv1.weight"][:, :4] = 0
    trained = ran("recover:epochs=2:batch_size=16:lr=0.02", start, samples, teacher)
    assert zeros(trained.state_dict()["layer1.conv1.weight"]) == 0


def test_integers_are_zero_where_weights_were_and_stay_so_in_training(teacher: Program, samples: Tensor) -> None:
    sparse = ran("sparsify:ratio=0.6,fold", teacher, samples)
    stored = ran("sparsify:ratio=0.6,int8:weight_bits=3,qat:epochs=2:batch_size=16:lr=0.02", teacher, samples)
    plain = ran("sparsify:ratio=0.6,int8:weight_bits=3", teacher, samples)
    for name in ("stem.weight", "layer1.conv1.weight", "down.weight"):
        chosen, integers = sparse.state_dict()[name] == 0, stored.state_dict()[f"{name}_int8"]
        assert int(chosen.sum()) > 0
        assert not bool(integers[chosen].any())
        assert not torch.equal(integers, plain.state_dict()[f"{name}_int8"])


def test_in_steps_the_share_grows_and_what_is_left_is_trained_in_between(teacher: Program, samples: Tensor) -> None:
    ctx = Context(original=teacher).with_data(TensorSamples((samples,)))
    pass_ = Sparsify(SparsifyOptions(ratio=0.8, steps=2, epochs=1))
    plan = pass_.plan(teacher, ctx)
    weights = {name: plan.tensors[name] for name in plan.sites}
    assert {name: zeros(one) / one.numel() for name, one in weights.items()} == pytest.approx(
        dict.fromkeys(weights, 0.8), abs=0.02
    )
    kept = plan.tensors["stem.weight"] != 0
    assert not torch.equal(plan.tensors["stem.weight"][kept], teacher.state_dict()["stem.weight"][kept])
    assert any("running_mean" in name for name in plan.tensors)
    trained = ran("recover:epochs=1:batch_size=16:lr=0.01", pass_.apply(teacher, plan), samples, teacher)
    assert all(before == after for before, after in of_kind(trained, weights).values())


def test_the_contract_of_a_pass(samples: Tensor) -> None:
    torch.manual_seed(0)
    checked = check_pass(Sparsify(), Net().eval(), samples[:2], data=[samples])
    assert len(checked.plan.sites) == 3
    check_pass(Sparsify(SparsifyOptions(by="gradient", scope="global")), Net().eval(), samples[:2], data=[samples])


def test_what_would_change_nothing_is_refused(program: Program) -> None:
    for options, said in (
        ({"threshold": 0.1, "ratio": 0.5}, "it reads no `ratio`"),
        ({"samples": 3}, "by=magnitude reads no `samples`"),
        ({"epochs": 3}, "steps=1 has nothing in between"),
    ):
        with pytest.raises(UsageError, match=said):
            build("sparsify", SparsifyOptions, options)
    with pytest.raises(UsageError, match="nothing"):
        plan_of(program, skip=("nothing",))
    with pytest.raises(DataError, match="Pass `sparsify` needs data to recover on between steps"):
        plan_of(program, steps=2)
    with pytest.raises(DataError, match="Pass `sparsify` needs samples to learn from and others to judge by"):
        plan_of(program, torch.randn(4, 3, 8, 8), steps=2)
    plan = plan_of(program, skip=("head.*",))
    assert ("head.weight", "named in skip") in [(one.site, one.reason) for one in plan.refusals]
