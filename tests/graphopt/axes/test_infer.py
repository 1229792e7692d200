"""What the inference finds in small models: groups with their members, refusals with their reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from graphopt.axes.call import Call
from graphopt.axes.groups import Group
from graphopt.axes.infer import Axes, infer
from graphopt.axes.layout import Dims, describe, leaves
from graphopt.axes.proof.masked import check_masked_equivalence
from graphopt.axes.proof.step import MaskedStep, masked_rule, tensor_result
from graphopt.axes.proof.value import CannotProveError, Value
from graphopt.axes.registry import ENTRY_POINTS, Rule, _load, built_in_rules
from graphopt.axes.rewrite import remove, slices
from graphopt.capturing.capture import capture
from graphopt.errors import PassError
from tests import models
from tests.models import example


def axes_of(model: nn.Module | type[nn.Module], x: Tensor | None = None) -> Axes:
    if isinstance(model, type):
        return infer(captured(model))
    return infer(capture(model.double(), (x,)).graph_module)


def captured(kind: type[nn.Module]) -> fx.GraphModule:
    return models.captured(kind).graph_module


def summary(axes: Axes) -> dict[str, int]:
    return {group.name: group.size for group in axes.groups()}


def group(axes: Axes, name: str) -> Group:
    return next(group for group in axes.groups() if group.name == name)


def places(members: object) -> list[str]:
    return [f"{m.parameter}[{m.dim}]" for m in members]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (models.Residual, {"stem:width": 8, "inner:channels": 12}),
        (models.Depthwise, {"expand:channels": 6, "depthwise:channels": 2, "squeeze:channels": 4}),
        (
            models.GroupedShuffle,
            {
                "stem:channels": 3,
                "stem:channels#2": 4,
                "grouped:channels": 4,
                "grouped:channels#2": 4,
                "right:channels": 12,
            },
        ),
        (models.Dense, {"stem:channels": 6, "first:channels": 4, "second:channels": 4}),
        (models.UNet, {"inside:channels": 6, "down:channels": 8, "up:channels": 10, "fine:channels": 4}),
        (models.OptionA, {"stem:channels": 4}),
        (models.FusedAttention, {"embed:width": 24, "qkv:heads": 4, "qkv:head_dim": 6}),
        (models.TiedWeights, {"down:width": 8, "up:hidden": 12}),
        (models.Mixer, {"patch:channels": 8, "tokens:hidden": 6, "channels:hidden": 10}),
        (models.GroupNormed, {"stem:channels": 3, "stem:channels#2": 4}),
        (models.WritesThroughViews, {"a:hidden": 6, "b:hidden": 4}),
        (models.Recurrent, {"embed:hidden": 9, "lstm.weight_ih_l0:hidden": 6}),
        (models.NeighbourGate, {}),
    ],
)
def test_groups(kind: type[nn.Module], expected: dict[str, int]) -> None:
    assert summary(axes_of(kind)) == expected


def test_members_producers_and_consumers_of_a_residual_axis() -> None:
    found = group(axes_of(models.Residual), "stem:width")
    assert places(found.producers) == ["stem.weight[0]", "outer.weight[0]"]
    assert places(found.consumers) == ["inner.weight[1]", "head.weight[1]"]
    assert {"norm.running_mean[0]", "norm.running_var[0]", "outer.bias[0]"} <= set(places(found.members))


def test_query_heads_are_key_heads_times_repeats() -> None:
    axes = axes_of(models.GroupedQuery)
    query, key = axes.parameters["q.weight"][0], axes.parameters["k.weight"][0]
    assert describe(query) == "(2 x 2 x [2 | 2])"
    assert describe(key) == "(2 x [2 | 2])"
    # The halves of a rotary head are one axis, which the frequencies carry too.
    halves = {axis.id for axis in list(leaves(query))[2:]}
    assert halves == {axis.id for axis in list(leaves(key))[1:]}
    assert halves == {axis.id for axis in leaves(axes.parameters["inv_freq"][0])}


def test_heads_merged_into_the_batch_stay_removable() -> None:
    axes = axes_of(models.SplitAttention)
    assert summary(axes) == {"q:heads": 3, "q:head_dim": 4, "v:head_dim": 4}
    assert {m.parameter for m in group(axes, "q:heads").producers} == {"q.weight", "k.weight", "v.weight"}


def test_the_head_dimension_of_query_and_key_needs_no_weight_that_consumes_it() -> None:
    found = group(axes_of(models.SplitAttention), "q:head_dim")
    assert places(found.producers) == ["q.weight[0]", "k.weight[0]"]
    assert found.consumers == ()
    assert found.kind == "head_dim"


def test_tied_names_are_one_tensor() -> None:
    model = models.TiedWeights().double()
    ep = torch.export.export(model, (example(model),), strict=False)
    found = group(infer(ep.module(check_guards=False)), "down:width")
    assert {"embed.weight[1]", "head.weight[1]"} <= set(places(found.members))


def test_computed_weights_have_roles() -> None:
    axes = axes_of(models.WeightNormed)
    low = group(axes, "low:hidden")
    assert (places(low.producers), places(low.consumers)) == (["low[1]"], ["high[0]"])


class Fixed(nn.Module):
    """A hidden layer whose activations go through `between`."""

    def __init__(self, between: Callable[[Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, width), nn.Linear(width, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


VECTOR = torch.randn(2, 5, dtype=torch.float64)


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda x: x.cummax(-1)[0], "positions are returned at aten::cummax (`cummax`)"),
        (lambda x: x.flip(-1), "the order of positions matters at aten::flip (`flip`)"),
        (lambda x: x.roll(1, -1), "the order of positions matters at aten::roll (`roll`)"),
        (lambda x: x.sort(-1)[0], "the order of positions matters at aten::sort (`sort`)"),
        (lambda x: x * x.argmax(-1, keepdim=True), "positions are returned at aten::argmax (`argmax`)"),
        (lambda x: x + torch.arange(8), "values depend on the position at aten::arange (`arange`)"),
        (lambda x: x[:, torch.tensor([1, 0, 2, 3, 4, 5, 7, 6])], "addressed by index at aten::index (`index`)"),
        (lambda x: F.avg_pool1d(x[:, None], 3, 1, 1)[:, 0], "spatial dimension at aten::avg_pool1d (`avg_pool1d`)"),
    ],
)
def test_order_and_position_freeze_an_axis(between: Callable[[Tensor], Tensor], reason: str) -> None:
    axes = axes_of(Fixed(between), VECTOR)
    assert axes.groups() == []
    assert reason in {r.reason for r in axes.refusals() if r.parameter == "first.weight"}


def test_a_transposed_view_added_to_itself_is_frozen() -> None:
    axes = axes_of(Fixed(lambda x: x.view(-1, 2, 3).transpose(1, 2).flatten(1) + x, width=6), VECTOR)
    assert axes.groups() == []
    assert any("(3 x 2) and (2 x 3) have no common refinement at aten::add" in r.reason for r in axes.refusals())


def test_a_square_view_transposed_and_added_to_itself_is_a_power_of_one_axis() -> None:
    axes = axes_of(Fixed(lambda x: x.view(-1, 3, 3).transpose(1, 2).flatten(1) + x, width=9), VECTOR)
    assert describe(axes.parameters["first.weight"][0]) == "(3 x 3)"
    assert summary(axes) == {"first:hidden": 3}


def test_graph_inputs_and_outputs_are_frozen_by_name() -> None:
    reasons = {r.name: r.reason for r in axes_of(models.Residual).refusals()}
    assert reasons == {"stem:channels": "reaches graph input `x`", "head:hidden": "reaches graph output `linear`"}


def test_an_axis_nothing_consumes_is_refused() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(5, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x).norm(dim=-1)

    (found,) = [r for r in axes_of(Norm(), VECTOR).refusals() if r.size == 8]
    assert found.reason == "no weight consumes it"


def test_an_unknown_operator_freezes_what_it_touches_and_is_named() -> None:
    rules = {name: rule for name, rule in built_in_rules().items() if name != "pointwise"}
    gm = capture(Fixed(torch.tanh).double(), (VECTOR,)).graph_module
    axes = infer(gm, rules)
    assert axes.groups() == []
    assert [node.name for node in axes.unknown["aten::tanh"]] == ["tanh"]
    (reason,) = [r.reason for r in axes.refusals() if r.name == "first:hidden"]
    assert reason.startswith("unknown operator aten::tanh at `tanh` (")
    assert "test_infer.py" in reason or "models" in reason or ".py:" in reason


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (lambda call: (), "ill-fitting rule of operator aten::tanh"),
        (lambda call: call.dims("missing"), "failing rule (KeyError: 'missing') of operator aten::tanh"),
    ],
)
def test_a_plugin_rule_that_is_wrong_freezes_and_says_so(broken: Callable[[object], object], reason: str) -> None:
    rules = {**built_in_rules(), "aten::tanh": Rule(broken)}  # type: ignore[arg-type]
    axes = infer(capture(Fixed(torch.tanh).double(), (VECTOR,)).graph_module, rules)
    assert axes.groups() == []
    assert any(r.reason.startswith(reason) for r in axes.refusals())


def test_missing_metadata_is_an_error() -> None:
    gm = capture(Fixed(torch.tanh).double(), (VECTOR,)).graph_module
    next(node for node in gm.graph.nodes if node.op == "call_function").meta.pop("val")
    with pytest.raises(PassError, match="no meta\\['val'\\]"):
        infer(gm)


def test_memory_that_overlaps_under_two_names_is_frozen() -> None:
    class Overlap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            memory = torch.randn(9, 5, dtype=torch.float64)
            self.a, self.b = nn.Parameter(memory[:8]), nn.Parameter(memory[1:])
            self.c = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(x @ self.a.t() + x @ self.b.t())

    gm = capture(Overlap().double(), (VECTOR,), share_tensors=True).graph_module
    axes = infer(gm)
    assert axes.groups() == []
    assert any("shares part of its memory" in r.reason for r in axes.refusals())


def test_the_size_of_a_merged_dimension_used_as_a_number_freezes_its_factors() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 8), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            merged = self.first(x).view(-1, 4)  # (batch * 2, 4)
            merged = merged * merged.shape[0]
            return self.second(merged.relu())

    axes = axes_of(Counted(), VECTOR)
    assert all(group.size != 2 for group in axes.groups())


def test_every_node_has_a_layout_of_its_size() -> None:
    gm = captured(models.GroupedShuffle)
    axes = infer(gm)
    tensors = [n for n in gm.graph.nodes if isinstance(n.meta.get("val"), Tensor) and n.op != "output"]
    assert all(isinstance(node, fx.Node) and len(axes.layouts[node]) == node.meta["val"].dim() for node in tensors)


def test_the_same_graph_gives_the_same_groups() -> None:
    first, second = (axes_of(models.GroupedQuery) for _ in range(2))
    assert first.groups() == second.groups()
    assert first.refusals() == second.refusals()


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[[], object]]]:
    """Let these be what installed entry points load."""
    loads: list[Callable[[], object]] = []

    class Entry:
        name = "mylib"

        def __init__(self, load: Callable[[], object]) -> None:
            self.load = load

    monkeypatch.setattr(
        "importlib.metadata.entry_points", lambda group: [Entry(f) for f in loads if group == ENTRY_POINTS]
    )
    _load.cache_clear()
    yield loads
    _load.cache_clear()


def test_a_plugin_registers_rules_by_entry_point(plugins: list[Callable[[], object]]) -> None:
    registered: list[str] = []
    plugins.append(lambda: lambda: registered.append("mylib"))
    built_in_rules()
    built_in_rules()
    assert registered == ["mylib"]


def test_a_broken_plugin_says_one_line_and_breaks_nothing(
    plugins: list[Callable[[], object]], caplog: pytest.LogCaptureFixture
) -> None:
    plugins.append(lambda: 1 / 0)
    assert "aten::linear" in built_in_rules()
    lines = [r.getMessage() for r in caplog.records if r.name == "graphopt.axes.registry"]
    assert lines == ["The axis rules `mylib` cannot be loaded: ZeroDivisionError: division by zero"]


@torch.library.custom_op("axes_tests::scale_channels", mutates_args=())
def scale_channels(x: Tensor, scale: Tensor) -> Tensor:
    return x * scale


@scale_channels.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_a_rule_for_a_custom_operator_frees_what_it_touches() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.ops.axes_tests.scale_channels(self.first(x), self.scale))

    def along_the_last(call: Call) -> Dims:
        call.unify(call.dims("x")[-1], call.dims("scale")[0])
        return call.dims("x")

    gm = capture(Scaled().double(), (VECTOR,)).graph_module
    assert list(infer(gm).unknown) == ["axes_tests::scale_channels"]
    assert infer(gm).groups() == []
    rules = {**built_in_rules(), "axes_tests::scale_channels": Rule(along_the_last)}
    axes = infer(gm, rules)
    assert summary(axes) == {"first:hidden": 8}
    kept = {axes.groups()[0].axis: [0, 2, 5]}
    pruned = remove(gm, axes, kept)
    with pytest.raises(CannotProveError, match=r"axes_tests\.scale_channels"):
        check_masked_equivalence(gm, pruned, slices(axes, kept), (VECTOR,))
    masked_rule("axes_tests::scale_channels")(like_the_first)
    assert check_masked_equivalence(gm, pruned, slices(axes, kept), (VECTOR,)) < 1e-12  # rounding in float64


def like_the_first(step: MaskedStep) -> Value:
    return Value(tensor_result(step.run()), step.first().dead)
