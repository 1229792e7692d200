"""Axis inference, removal and its proof through higher-order regions: cond, while_loop, scan, map, autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._higher_order_ops.map import map as each
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.functional import scaled_dot_product_attention

from graphopt.axes.infer import infer
from graphopt.axes.proof.masked import check_masked_equivalence
from graphopt.axes.rewrite import remove, slices
from graphopt.capturing.capture import capture
from graphopt.errors import VerifyError
from graphopt.ir.program import Program
from graphopt.ir.regions import regions
from graphopt.job.optimizing import optimize
from graphopt.pipeline.registry import backend

ROWS = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))


class Between(nn.Module):
    """A region between two layers."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 5)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.region = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.region(self, self.first(x)))


def _views(m: Any, h: Tensor) -> Tensor:
    """Branches that see the result in different factors, one branch inside another, one unused weight in each."""

    def then(h: Tensor) -> Tensor:
        with torch.no_grad():
            scale = h.mean(-1, keepdim=True)
        inner = torch.cond(h.mean() > 0, lambda h: m.down(m.up(h).relu_()), m.a, (m.norm(h),))
        return inner * scale * torch.arange(16) if inner.requires_grad else inner * scale

    def other(h: Tensor) -> Tensor:
        return m.b(h).reshape(*h.shape[:2], 4, 4).transpose(2, 3).transpose(2, 3).flatten(2)

    return torch.cond(h.sum() > 0, then, other, (h,))


def _attention(m: Any, h: Tensor) -> Tensor:
    def attend(h: Tensor) -> Tensor:
        q, k, v = m.qkv(h).view(*h.shape[:2], 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return m.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    return h + torch.cond(h.mean() > 0, attend, lambda h: m.a(h).tanh(), (h,))


def _loop(m: Any, h: Tensor) -> Tensor:
    def going(step: Tensor, h: Tensor) -> Tensor:
        return (step < 3) & (h.abs().max() < 1e6)

    def body(step: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return step + 1, h + m.down(m.up(h).relu())

    return while_loop(going, body, (torch.tensor(0), h))[1]


def _recurrence(m: Any, h: Tensor) -> Tensor:
    def step(state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.tanh(m.a(state) + m.b(x))
        return state, m.down(m.up(state).relu())

    return scan(step, h[:, 0] * 0, h.transpose(0, 1))[1].transpose(0, 1)


def _stacked_layers(m: Any, h: Tensor) -> Tensor:
    def layer(h: Tensor, weights: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h = h + (h @ weights[0]).relu() @ weights[1]
        return h, h.clone()

    return scan(layer, h, (m.ups, m.downs))[0]


def _each(m: Any, h: Tensor) -> Tensor:
    return each(lambda row: m.down(m.up(row).relu()), h.transpose(0, 1)).transpose(0, 1)


def _lower_precision(m: Any, h: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.down(m.up(h).relu()).to(h.dtype)


def _precision_and_back(m: Any, h: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = m.up(h).relu()
        with torch.autocast("cpu", enabled=False):
            h = m.down(h.float())
    return h


def _constants(m: Any, h: Tensor) -> Tensor:
    def then(h: Tensor) -> Tensor:
        return m.down(m.up(h).relu()) * torch.tensor([1.0, 2.0, 3.0, 4.0] * 4)

    return torch.cond(h.sum() > 0, then, lambda h: h + 1, (h,))


def _samples_of_heads(m: Any, h: Tensor) -> Tensor:
    """Samples and heads are one dimension in the branches."""
    q = m.q(h).unflatten(2, (4, 6)).transpose(1, 2).flatten(0, 1)
    q = torch.cond(h.sum() > 0, lambda q: (q @ q.transpose(1, 2)).softmax(-1) @ q, lambda q: q * 2, (q,))
    return m.out(q.unflatten(0, (h.shape[0], 4)).transpose(1, 2).flatten(2))


def _rows_of_heads(m: Any, h: Tensor) -> Tensor:
    """A branch is given how many samples and heads there are together."""
    q = m.q(h).unflatten(2, (4, 6)).transpose(1, 2).flatten(0, 1)
    count = q.shape[0]
    q = torch.cond(h.sum() > 0, lambda q: q.reshape(count, 36).relu().view(count, 6, 6), lambda q: q * 2, (q,))
    return m.out(q.unflatten(0, (h.shape[0], 4)).transpose(1, 2).flatten(2))


def _chosen_rows(m: Any, h: Tensor) -> Tensor:
    """How many rows there are follows from data, in a branch."""

    def then(h: Tensor) -> Tensor:
        up = m.up(h).relu()
        return m.down(up) + m.down(up[up.sum(-1) > 0.5]).sum()

    return torch.cond(h.sum() > 0, then, lambda h: h + 1, (h,))


def _written(m: Any, h: Tensor) -> Tensor:
    """The block returns nothing: what it does is seen through the view it writes to."""
    up = m.up(h)
    first = up[:, 0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first.add_(1.0)
    return m.down(up.relu())


def _linears(**shapes: tuple[int, int]) -> dict[str, nn.Module]:
    return {name: nn.Linear(*shape) for name, shape in shapes.items()}


_UP_DOWN = {"up": (16, 24), "down": (24, 16)}
# region, its layers, the groups it has and their sizes
CASES: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[], dict[str, Any]], dict[str, int]]] = {
    "branches": (
        _views,
        lambda: {**_linears(a=(16, 16), b=(16, 16), **_UP_DOWN), "norm": nn.LayerNorm(16)},
        {"first:hidden": 16, "up:hidden": 24, "a:hidden": 4, "a:hidden#2": 4},
    ),
    "attention": (
        _attention,
        lambda: _linears(a=(16, 16), qkv=(16, 48), out=(16, 16)),
        {"first:width": 16, "qkv:heads": 4, "qkv:head_dim": 4},
    ),
    "loop": (_loop, lambda: _linears(**_UP_DOWN), {"first:width": 16, "up:hidden": 24}),
    "recurrence": (
        _recurrence,
        lambda: _linears(a=(16, 16), b=(16, 16), **_UP_DOWN),
        {"first:width": 16, "up:hidden": 24, "down:hidden": 16},
    ),
    "stacked layers": (
        _stacked_layers,
        lambda: {"ups": nn.Parameter(torch.randn(3, 16, 24)), "downs": nn.Parameter(torch.randn(3, 24, 16))},
        {"downs:width": 16, "ups:channels": 24},
    ),
    "each": (_each, lambda: _linears(**_UP_DOWN), {"first:hidden": 16, "up:hidden": 24, "down:hidden": 16}),
    "lower precision": (
        _lower_precision,
        lambda: _linears(**_UP_DOWN),
        {"first:hidden": 16, "up:hidden": 24, "down:hidden": 16},
    ),
    "constants": (_constants, lambda: _linears(**_UP_DOWN), {"up:hidden": 24}),
    "samples of heads": (
        _samples_of_heads,
        lambda: _linears(q=(16, 24), out=(24, 16)),
        {"first:hidden": 16, "q:heads": 4, "q:head_dim": 6, "out:hidden": 16},
    ),
    "rows of heads": (
        _rows_of_heads,
        lambda: _linears(q=(16, 24), out=(24, 16)),
        {"first:hidden": 16, "q:hidden": 4, "q:hidden#2": 6, "out:hidden": 16},
    ),
    "chosen rows": (_chosen_rows, lambda: _linears(**_UP_DOWN), {"first:width": 16, "up:hidden": 24}),
    "written": (_written, lambda: _linears(**_UP_DOWN), {"first:hidden": 16, "up:hidden": 24, "down:hidden": 16}),
    "precision and back": (
        _precision_and_back,
        lambda: _linears(**_UP_DOWN),
        {"first:hidden": 16, "up:hidden": 24, "down:hidden": 16},
    ),
}


def fresh(case: str) -> Program:
    torch.manual_seed(0)
    region, layers, _ = CASES[case]
    return capture(Between(region, **layers()), (ROWS,))


captured = functools.cache(fresh)


def pruned(program: Program) -> tuple[fx.GraphModule, dict[str, dict[int, list[int]]]]:
    """Remove half of every group, at random."""
    generator = torch.Generator().manual_seed(0)
    axes = infer(program.graph_module)
    kept = {g.axis: sorted(torch.randperm(g.size, generator=generator)[: g.size // 2].tolist()) for g in axes.groups()}
    return remove(program.graph_module, axes, kept), slices(axes, kept)


@pytest.mark.parametrize("case", CASES)
def test_axes_run_through_a_region(case: str) -> None:
    axes = infer(captured(case).graph_module)
    assert {group.name: group.size for group in axes.groups()} == CASES[case][2]
    assert not axes.unknown


@pytest.mark.parametrize("case", CASES)
def test_half_of_every_group_goes_and_the_rest_is_exact(case: str) -> None:
    program = captured(case)
    before = program(ROWS)
    gm, kept = pruned(program)
    error = check_masked_equivalence(program.graph_module, gm, kept, (ROWS,))
    assert error < 1e-12
    assert program.with_graph(gm)(ROWS).requires_grad  # it can be trained
    assert torch.equal(program(ROWS), before)  # the bodies of the original are its own


# Not among them: what torch 2.13 has no ONNX form for (map; a scan of products with a dynamic batch), and products of
# bfloat16, which ONNX Runtime has no kernel for.
@pytest.mark.parametrize("case", ["attention", "loop", "recurrence"])
def test_pruned_regions_reach_the_runtime(case: str, tmp_path: Path) -> None:
    program = captured(case)
    result = optimize(program, passes="prune:ratio=0.5:round_to=1:criterion=random", lower=False)
    runtime = backend("onnxruntime")
    runtime.verify(runtime.lower(result.program, tmp_path / "model.onnx"), result.program)
    assert len(result.plans[0].sites) == len(CASES[case][2])
    assert sum(p.numel() for p in result.program.parameters()) < sum(p.numel() for p in program.parameters())


@pytest.mark.parametrize("case", ["branches", "attention"])
@pytest.mark.parametrize("branch", [0, 1])
def test_a_mistake_in_either_branch_is_found(case: str, branch: int) -> None:
    program = captured(case)
    gm, kept = pruned(program)
    body = next(regions(gm)).bodies[branch]
    call = [n for n in body.graph.nodes if n.op == "call_function" and getattr(n.meta["val"], "ndim", 0) == 3][-1]
    with body.graph.inserting_after(call):
        rolled = body.graph.call_function(torch.ops.aten.roll.default, (call, [1], [-1]))
    call.replace_all_uses_with(rolled, delete_user_cb=lambda user: user is not rolled)
    body.recompile()
    with pytest.raises(VerifyError, match="Masked equivalence fails"):
        check_masked_equivalence(program.graph_module, gm, kept, (ROWS,))


def test_a_mistake_in_the_condition_of_a_loop_is_found() -> None:
    program = captured("loop")
    gm, kept = pruned(program)
    body = next(regions(gm)).bodies[0]
    largest = next(node for node in body.graph.nodes if node.target is torch.ops.aten.max.default)
    largest.target = torch.ops.aten.sum.default
    body.recompile()
    with pytest.raises(VerifyError, match="node `max_1`"):
        check_masked_equivalence(program.graph_module, gm, kept, (ROWS,))


def test_what_a_condition_reads_of_a_removed_axis_is_taken_over_survivors() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.last(torch.cond(h.mean() > 0, torch.relu, torch.tanh, (h,)))

    program = capture(Gated(), (ROWS,))
    gm, kept = pruned(program)
    assert check_masked_equivalence(program.graph_module, gm, kept, (ROWS,)) < 1e-12


def test_the_steps_of_a_scan_stay() -> None:
    axes = infer(captured("stacked layers").graph_module)
    steps = axes.parameters["ups"][0]
    assert all("gone through step by step in scan at `scan`" in axes.frozen[axis.id] for axis in [steps])


def test_an_unknown_operator_in_a_branch_holds_what_it_touches() -> None:
    def region(m: Any, h: Tensor) -> Tensor:
        return torch.cond(h.sum() > 0, lambda h: m.down(torch.linalg.qr(m.up(h))[0]), lambda h: m.a(h), (h,))

    torch.manual_seed(0)
    layers = _linears(a=(16, 16), up=(16, 6), down=(6, 16))
    axes = infer(capture(Between(region, **layers), (ROWS,)).graph_module)
    assert "up:hidden" not in [group.name for group in axes.groups()]
    assert "first:hidden" in [group.name for group in axes.groups()]


def test_a_body_that_two_regions_share_holds_what_enters_the_second() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            h = torch.cond(h.mean() > 0, torch.relu, torch.tanh, (h,))
            return self.last(torch.cond(h.mean() > 1, torch.relu, torch.tanh, (h,)))

    gm = capture(Twice(), (ROWS,)).graph_module
    one, other = regions(gm)
    assert [group.name for group in infer(gm).groups()] == ["first:hidden"]
    other.node.args = (other.node.args[0], *one.reads, *other.node.args[3:])
    axes = infer(gm)
    assert axes.groups() == []
    assert remove(gm, axes, {})(ROWS).shape == (4, 6, 5)
    assert "whose body another shares, cond at `cond_1`" in next(r.reason for r in axes.refusals() if r.size == 16)


def test_autocast_that_is_off_stays_inside_autocast_that_is_on() -> None:
    (outer,) = regions(captured("precision and back").graph_module)
    (inner,) = regions(outer.main)
    assert [outer.node.args[2], inner.node.args[2]] == [True, False]
    products = [n for n in inner.main.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert [n.meta["val"].dtype for n in products] == [torch.float32]


def test_a_region_of_an_unknown_kind_is_not_looked_into() -> None:
    program = captured("attention").copy()
    next(regions(program.graph_module)).node.target = torch.ops.higher_order.invoke_subgraph
    axes = infer(program.graph_module)
    reason = next(refusal.reason for refusal in axes.refusals() if refusal.name.startswith("first:"))
    assert "inside a region that is not looked into, invoke_subgraph at `cond`" in reason


def test_regions_of_other_models_do_not_matter() -> None:
    """All regions are compiled by way of one function, which would take sizes that varied there for dynamic."""
    for n in (2, 5, 4, 3):
        torch.cond(torch.tensor(True), torch.relu, torch.tanh, (torch.randn(n * 4, n + 3, n * 2, requires_grad=True),))
    program = fresh("rows of heads")
    assert program(ROWS[:3]).shape == (3, 6, 5)
