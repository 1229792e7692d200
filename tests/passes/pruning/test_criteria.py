"""Criteria: what each says an index is worth, worked out by hand or by brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.axes.groups import Group
from graphopt.axes.infer import infer
from graphopt.axes.rewrite import remove
from graphopt.capturing.capture import capture
from graphopt.errors import DataError, PassError, UsageError
from graphopt.ir.program import Program
from graphopt.passes.prune import Prune, PruneOptions, PruningPlan
from graphopt.passes.pruning.criteria import CRITERIA, rank
from graphopt.passes.pruning.options import Criterion
from graphopt.passes.pruning.standing import Standing
from graphopt.pipeline.context import Context, Loss
from graphopt.pipeline.options import build
from graphopt.pipeline.pipeline import Pipeline
from graphopt.testing import TensorSamples
from tests import models
from tests.models import example

NEED_DATA = ("activation", "taylor", "obd")


class Mlp(nn.Module):
    """One hidden layer of four units without biases, and one output."""

    def __init__(self, first: list[list[float]], second: list[float]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, len(second), bias=False), nn.Linear(len(second), 1, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor(first))
            self.second.weight.copy_(torch.tensor([second]))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def mlp() -> Mlp:
    return Mlp([[1, 2], [-2, 1], [3, 0], [0.5, 0.5]], [1, -3, 0.5, 2])


# Gradients are taken of four samples at once. Of these only every fourth is there, so that each draw is one sample.
ALONE = torch.zeros(64, 2)
ALONE[::4] = torch.randn(16, 2, generator=torch.Generator().manual_seed(1))


def scores(
    model: nn.Module,
    criterion: Criterion,
    data: Tensor = ALONE,
    labels: Tensor | None = None,
    loss: Loss | None = None,
    kept: dict[int, list[int]] | None = None,
) -> list[Tensor | str]:
    """Score every group, in order."""
    program = capture(model, (data[:2],))
    axes = infer(program.graph_module)
    ctx = Context(original=program, samples=TensorSamples((data,), labels), loss=loss)
    found, reasons = rank(criterion, Standing(program, axes, kept or {}, ctx, 1024), axes.groups())
    return [found.get(group.axis, reasons.get(group.axis, "")) for group in axes.groups()]


def hidden(model: Mlp, data: Tensor = ALONE) -> Tensor:
    return model.first(data).relu().detach().double()


def assert_scores(found: Tensor | str, expected: Any) -> None:
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-12)


def mean_one(values: list[float]) -> Tensor:
    wide = torch.tensor(values, dtype=torch.float64)
    return wide / wide.mean()


# -- of weights ------------------------------------------------------------------------------------------


def test_l1_and_l2_are_norms_of_what_an_index_owns() -> None:
    (l1,), (l2,) = scores(mlp(), "l1"), scores(mlp(), "l2")
    assert_scores(l1, (mean_one([3, 3, 3, 1]) + mean_one([1, 3, 0.5, 2])) / 2)
    assert_scores(l2, (mean_one([5**0.5, 5**0.5, 3, 0.5**0.5]) + mean_one([1, 3, 0.5, 2])) / 2)


def test_fpgm_is_the_sum_of_distances_to_all_others() -> None:
    model = mlp()
    (found,) = scores(model, "fpgm")
    rows, columns = model.first.weight.detach().double(), model.second.weight.detach().double().T
    expected = [torch.cdist(points, points).sum(1) for points in (rows, columns)]
    assert_scores(found, sum(one / one.mean() for one in expected) / 2)


def test_fpgm_tells_points_apart_that_lie_far_from_zero_and_close_together() -> None:
    far = Mlp([[1e4, 0], [1e4 + 1, 0], [1e4 + 2, 0], [1e4 + 10, 0]], [1, 1, 1, 1])
    (found,) = scores(far, "fpgm")
    distances = mean_one([13, 11, 11 + 0, 27])
    assert_scores(found, (distances + 1) / 2)


def test_lamp_divides_by_all_that_is_not_smaller() -> None:
    model = Mlp([[2, 0], [1, 0], [0, 0], [0, 1]], [1, 2, 3, 4])
    (found,) = scores(model, "lamp")
    producer = torch.tensor([4 / 4, 1 / 6, 0 / 6, 1 / 6])
    consumer = torch.tensor([1 / 30, 4 / 29, 9 / 25, 16 / 16])
    assert_scores(found, (producer + consumer) / 2)


def test_lamp_leaves_every_group_its_best_index() -> None:
    class Uneven(nn.Module):
        """One layer's weights are a thousandth of the other's."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(2, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            with torch.no_grad():
                self.a.weight.mul_(1e-3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x).relu()).relu())

    plan = plan_of(Uneven(), None, criterion="lamp", scope="global", ratio=0.6, min_channels=1)
    assert sorted(len(kept) for kept in plan.groups.values()) == [3, 4]  # and not [1, 6]


def test_bn_scale_is_the_scale_of_the_norm() -> None:
    model = models.Residual()
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor([1.0, -2, 3, -4, 5, -6, 7, -8]))
        model.inner_norm.weight.copy_(torch.arange(12.0))
    width, inner = scores(model.double(), "bn_scale", example(model, 8))
    assert_scores(width, [1, 2, 3, 4, 5, 6, 7, 8])
    assert_scores(inner, torch.arange(12.0))


def test_bn_scale_reads_a_norm_written_by_hand() -> None:
    model = models.GroupedQuery()
    with torch.no_grad():
        model.norm.copy_(torch.arange(16.0) - 4)
    found = scores(model.double(), "bn_scale", example(model, 8))
    assert_scores(found[0], (torch.arange(16.0) - 4).abs())


def test_bn_scale_leaves_whole_what_no_norm_scales_and_says_so() -> None:
    plan = plan_of(mlp(), ALONE, criterion="bn_scale")
    assert plan.sites == ()
    (reason,) = [refusal.reason for refusal in plan.refusals if refusal.site == "first:hidden"]
    assert reason.startswith("no norm scales it, which criterion=bn_scale ranks by")


# -- of samples ------------------------------------------------------------------------------------------


def test_activation_is_the_mean_magnitude_of_what_the_consumers_read() -> None:
    model = mlp()
    (found,) = scores(model, "activation")
    mean = hidden(model).abs().mean(0)
    assert_scores(found, mean / mean.mean())


def test_activation_reads_query_and_key_where_they_meet() -> None:
    model = models.SplitAttention().double()
    data = example(model, 16)
    found = {group.name: worth for group, worth in zip(_groups(model), scores(model, "activation", data), strict=True)}
    parts = [layer(data).view(16, 6, 3, 4).abs().mean((0, 1, 2)).detach() for layer in (model.q, model.k)]
    assert_scores(found["q:head_dim"], sum(part / part.mean() for part in parts) / 2)


def _groups(model: nn.Module, data: Tensor | None = None) -> list[Group]:
    return infer(capture(model, (example(model) if data is None else data[:2],)).graph_module).groups()


def test_taylor_without_a_loss_is_what_the_outputs_lose() -> None:
    model = mlp()
    (found,) = scores(model, "taylor")
    lost = hidden(model) * model.second.weight.detach().double()  # (samples, units): the output is their sum
    assert_scores(found, lost[::4].square().mean(0).sqrt())


def test_taylor_with_many_outputs_is_that_on_average() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Linear(4, 50, bias=False))
    data = torch.zeros(512, 2)
    data[::4] = 1
    (found,) = scores(model, "taylor", data)
    assert isinstance(found, Tensor)
    carried = (model[0].weight.sum(1) * model[1].weight.norm(dim=0)).abs().detach().double()
    # A draw's square is chi-squared with one degree of freedom: of the mean of 128 the deviation is an eighth.
    assert bool(((found / carried).square() - 1).abs().max() < 5 * (2 / 128) ** 0.5)


def test_taylor_with_a_loss_and_labels_follows_its_gradient() -> None:
    model = mlp()
    labels = torch.linspace(-1, 2, 64)
    (found,) = scores(model, "taylor", labels=labels, loss=lambda y, t: (y.squeeze(1) - t).square().mean())
    residual = (model(ALONE).squeeze(1) - labels).detach().double()
    change = 2 * residual[:, None] * hidden(model) * model.second.weight.detach().double()
    assert_scores(found, change[::4].square().mean(0).sqrt())


def test_obd_sums_the_squares_element_by_element() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False), nn.Conv2d(3, 1, 2, bias=False))
    data = torch.zeros(64, 1, 2, 2)
    data[::4] = torch.randn(16, 1, 2, 2)
    (found,) = scores(model, "obd", data)
    values = model[0](data)[::4].detach().double()  # (samples, channels, 2, 2), each met by one tap
    expected = (values * model[1].weight.detach().double()).square().sum((2, 3)).mean(0) / 2
    assert_scores(found, expected)


def test_a_criterion_sees_only_what_is_left() -> None:
    model = mlp()
    program = capture(model, (ALONE[:2],))
    pass_ = Prune(build("prune", PruneOptions, {"ratio": 0.5, "round_to": 1, "compensate": False}))
    plan = pass_.plan(program, Context(original=program))
    pruned = pass_.apply(program, plan)
    axes = infer(program.graph_module)
    (group,) = axes.groups()
    kept = {group.axis: list(plan.groups[group.name])}
    for criterion in ("l1", "activation", "taylor"):
        ctx = Context(original=program, samples=TensorSamples((ALONE,)))
        found, _ = rank(criterion, Standing(pruned, axes, kept, ctx, 64), [group])  # type: ignore[arg-type]
        worth = found[group.axis]
        assert torch.isinf(worth).tolist() == [index not in kept[group.axis] for index in range(4)]
        alone = infer(pruned.graph_module)
        expected, _ = rank(criterion, Standing(pruned, alone, {}, ctx, 64), alone.groups())  # type: ignore[arg-type]
        assert_scores(worth[kept[group.axis]], expected[alone.groups()[0].axis])


class Attends(nn.Module):
    """Attention and a hidden layer in front of one output, without biases: what an index does is small and linear."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form, self.gain = form, nn.Parameter(torch.rand(3) + 0.5)
        self.q, self.k, self.v = (nn.Linear(4, 6, bias=False) for _ in range(3))
        self.fused, self.out = nn.Linear(4, 18, bias=False), nn.Linear(6, 4, bias=False)
        self.up, self.down, self.head = (nn.Linear(i, o, bias=False) for i, o in ((4, 5), (5, 4), (4, 1)))
        with torch.no_grad():
            for layer in (self.out, self.down):
                layer.weight.mul_(0.01)
            for layer in (self.q, self.k):
                layer.weight.mul_(0.5)
            self.fused.weight[:12] *= 0.5

    def forward(self, x: Tensor, left: Tensor | None = None) -> Tensor:
        """`left` (head_dim,) says how much of each index is there wherever something sums over it."""
        parts = self.fused(x).split(6, -1) if "fused" in self.form else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.unflatten(-1, (2, 3)).transpose(1, 2) for part in parts)
        if self.form == "fused in one view":
            q, k, v = self.fused(x).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4).unbind(0)
        if left is not None:
            q, v = q * left, v * left
        if self.form == "scaled":
            q, k = q * self.gain, k * self.gain
        if self.form == "by hand":
            y = (q @ k.transpose(-1, -2) / 3**0.5).softmax(-1) @ v
        elif self.form == "einsum":
            y = torch.einsum("bhts,bhsd->bhtd", (torch.einsum("bhtd,bhsd->bhts", q, k) / 3**0.5).softmax(-1), v)
        elif self.form == "one value twice":
            y = (torch.einsum("bhtd,bhsd->bhts", q, q) / 3**0.5).softmax(-1) @ v
        else:
            y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return self.head((x + self.down(self.up(x))).square().mean(1))


ROWS = torch.zeros(64, 3, 4, dtype=torch.float64)
ROWS[::4] = torch.randn(16, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("form", ["apart", "fused", "scaled", "by hand", "einsum", "one value twice"])
def test_taylor_is_what_removal_does_to_the_output_whatever_sums_over_the_axis(form: str) -> None:
    program = capture(Attends(form).double(), (ROWS[:2],))
    axes = infer(program.graph_module)
    groups = [group for group in axes.groups() if group.kind != "width"]
    assert [group.kind for group in groups].count("head_dim") == 2  # of query and key, and of value
    ctx = Context(original=program, samples=TensorSamples((ROWS,)))
    found, _ = rank("taylor", Standing(program, axes, {}, ctx, 64), groups)
    (before,) = program.call_flat((ROWS[::4],))
    for group in groups:
        lost = []
        for index in range(group.size):
            kept = {group.axis: [i for i in range(group.size) if i != index]}
            (after,) = program.with_graph(remove(program.graph_module, axes, kept)).call_flat((ROWS[::4],))
            lost.append((after - before).square().mean().sqrt())
        torch.testing.assert_close(found[group.axis], torch.stack(lost).detach(), rtol=0.1, atol=0)


def test_taylor_counts_every_sum_over_an_axis_that_query_key_and_value_share() -> None:
    model = Attends("fused in one view").double()
    data, left = ROWS[::4], torch.ones(16, 1, 1, 3, dtype=torch.float64, requires_grad=True)
    (by_index,) = torch.autograd.grad(model(data, left).sum(), left)
    (found,) = (
        worth
        for group, worth in zip(_groups(model, ROWS), scores(model, "taylor", ROWS), strict=True)
        if group.kind == "head_dim"
    )
    assert_scores(found, by_index.flatten(1).square().mean(0).sqrt())


# -- all of them, on every structure ---------------------------------------------------------------------

_PROGRAMS: dict[type[nn.Module], Program] = {}


def program_of(kind: type[nn.Module]) -> Program:
    if kind not in _PROGRAMS:
        model = kind().double()
        torch.manual_seed(0)
        for parameter in model.parameters():  # at initialisation norms scale by 1, and units are dead
            nn.init.normal_(parameter)
        _PROGRAMS[kind] = capture(model, (example(kind),))
    return _PROGRAMS[kind]


STRUCTURES = [
    models.Depthwise,
    models.Dense,
    models.SplitAttention,
    models.GroupedQuery,
    models.Recurrent,
    models.TiedWeights,
]


@pytest.mark.parametrize("criterion", list(CRITERIA))
@pytest.mark.parametrize("kind", STRUCTURES, ids=lambda kind: kind.__name__)
def test_every_criterion_ranks_every_structure_or_says_why_not(kind: type[nn.Module], criterion: Criterion) -> None:
    program = program_of(kind)
    axes = infer(program.graph_module)
    ctx = Context(original=program, samples=TensorSamples((example(kind, 16),)))
    found, reasons = rank(criterion, Standing(program, axes, {}, ctx, 16), axes.groups())
    assert {group.axis for group in axes.groups()} == found.keys() | reasons.keys()
    assert not found.keys() & reasons.keys()
    assert bool(found) or criterion == "bn_scale"
    for group in axes.groups():
        if group.axis in found:
            assert found[group.axis].shape == (group.size,)
            alike = criterion == "fpgm" and group.size == 2  # two are equally far from each other
            assert alike or float(found[group.axis].std()) > 0, "what cannot tell indices apart ranks nothing"


# -- bad input -------------------------------------------------------------------------------------------


def plan_of(
    model: nn.Module, data: Tensor | None, loss: Loss | None = None, loss_name: str | None = None, **options: Any
) -> PruningPlan:
    program = capture(model, (ALONE[:2],))
    samples = None if data is None else TensorSamples((data,))
    pass_ = Prune(
        build("prune", PruneOptions, {"ratio": 0.5, "round_to": 1, "compensate": False, "loss": loss_name, **options})
    )
    return pass_.plan(program, Context(original=program, samples=samples, loss=loss))


@pytest.mark.parametrize("criterion", NEED_DATA)
def test_a_criterion_that_needs_data_says_so(criterion: str) -> None:
    with pytest.raises(DataError, match=f"Pass `prune` needs data for criterion={criterion}, and none was given"):
        plan_of(mlp(), None, criterion=criterion)


def _fails(output: Tensor, labels: Tensor | None) -> Tensor:
    raise TypeError("labels, please")


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (_fails, "The loss failed with TypeError: labels, please. It was called with the model's output and no labels"),
        (lambda y, _: y.squeeze(1), r"The loss returned a tensor of shape \(4,\); expected a scalar tensor"),
        (lambda y, _: 1.0, "The loss returned float; expected a scalar tensor"),
    ],
)
def test_a_loss_that_is_none_says_so(loss: Loss, message: str) -> None:
    with pytest.raises(DataError, match=message):
        plan_of(mlp(), ALONE, loss, criterion="taylor")


def test_a_loss_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "named_losses.py").write_text("def first(y, labels):\n    return y[:, 0].sum()\n")
    monkeypatch.chdir(tmp_path)
    text = "prune:ratio=0.5:criterion=taylor:loss=named_losses:first:round_to=1:compensate=no"
    pipeline = Pipeline.parse(text)
    assert pipeline.text == text
    program = capture(mlp(), (ALONE[:2],))
    context = Context(original=program, samples=TensorSamples((ALONE,)), loss=_fails)  # the one named goes before it
    plan = pipeline.steps[0].instance.plan(program, context)
    given = plan_of(mlp(), ALONE, lambda y, _: y[:, 0].sum(), criterion="taylor")
    assert plan.groups == given.groups
    assert plan.options["loss"] == "named_losses:first"


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("no_such_module:f", r"Option `loss` of pass `prune`: 'no_such_module:f': importing `no_such_module` failed"),
        ("torch.nn.functional:mse_los", r"has no `mse_los`. Did you mean `mse_loss`\?"),
        ("torch:pi", "'torch:pi' is a float, not a function"),
        ("losses/mine.py", "Pass `prune` cannot take .*`loss` is no module:function, as in loss=my_losses:smooth"),
    ],
)
def test_a_named_loss_that_cannot_be_found_says_so(loss: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_of(mlp(), ALONE, criterion="taylor", loss_name=loss)


def test_a_loss_that_nothing_follows_is_refused() -> None:
    with pytest.raises(UsageError, match="criterion=l2 follows no `loss`; taylor and obd do"):
        Pipeline.parse("prune:loss=torch.nn.functional:mse_loss")


def test_outputs_without_gradients_are_named() -> None:
    class Decision(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) > 0

    with pytest.raises(PassError, match="no gradient reaches the weights from the outputs"):
        plan_of(Decision([[1, 2], [-2, 1], [3, 0], [0.5, 0.5]], [1, -3, 0.5, 2]), ALONE, criterion="taylor")


def test_values_that_are_not_finite_leave_the_group_whole() -> None:
    class Logarithm(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu().log()).nan_to_num()

    plan = plan_of(Logarithm([[1, 2], [-2, 1], [3, 0], [0.5, 0.5]], [1, -3, 0.5, 2]), ALONE, criterion="activation")
    assert plan.sites == ()
    assert "its activation is not finite" in [refusal.reason for refusal in plan.refusals]


@pytest.mark.parametrize("criterion", ["l1", "l2", "fpgm", "lamp"])
def test_weights_that_are_not_finite_leave_the_group_whole(criterion: Criterion) -> None:
    model = mlp()
    with torch.no_grad():
        model.first.weight[2, 0] = torch.nan
    plan = plan_of(model, None, criterion=criterion)
    assert plan.sites == ()
    assert f"its {criterion} is not finite" in [refusal.reason for refusal in plan.refusals]


def of_batch_32(criterion: Criterion, samples: Tensor) -> PruningPlan:
    """Plan for a program that takes 32 samples at once, with a limit below that."""
    program = capture(mlp(), (torch.randn(32, 2),), dynamic_shapes={"x": {0: None}})
    pass_ = Prune(build("prune", PruneOptions, {"criterion": criterion, "samples": 16, "compensate": False}))
    return pass_.plan(program, Context(original=program, samples=TensorSamples((samples,))))


@pytest.mark.parametrize("criterion", NEED_DATA)
def test_samples_that_make_no_batch_of_a_static_program_are_named(criterion: Criterion) -> None:
    with pytest.raises(DataError, match=f"no batch for criterion={criterion}. Give at least 32 samples"):
        of_batch_32(criterion, ALONE[:31])


@pytest.mark.parametrize("criterion", NEED_DATA)
def test_a_static_program_gets_a_batch_whatever_the_limit(criterion: Criterion) -> None:
    assert of_batch_32(criterion, ALONE).sites
