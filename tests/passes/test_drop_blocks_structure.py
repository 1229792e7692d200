"""Residual branches in sums of many shapes: how many go of those asked for, and what is a shortcut where."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, fx, nn

from graphopt.capturing.capture import capture
from graphopt.ir.program import Program
from graphopt.passes.drop_blocks import DropBlocks, DropBlocksOptions, DropBlocksPlan
from graphopt.passes.residuals.branches import find_branches
from graphopt.pipeline.context import Context
from graphopt.testing import TensorSamples
from tests.passes.residual_models import WIDTH, Attention, ConvBlock, Mlp, ResNet

aten = torch.ops.aten


def plan_of(program: Program, **options: object) -> DropBlocksPlan:
    given: dict[str, object] = {"criterion": "last", **options}
    return DropBlocks(DropBlocksOptions(**given)).plan(program, Context(original=program))  # type: ignore[arg-type]


def names(program: Program) -> list[str]:
    return [branch.name for branch in find_branches(program.graph_module)[0]]


# How many


def test_what_was_asked_for_is_said() -> None:
    program = capture(ResNet().eval(), torch.randn(2, 3, 8, 8))
    plan = plan_of(program, blocks=2)
    assert (plan.asked, len(plan.dropped)) == (2, 2)
    assert plan.summary().startswith("asked for 2, dropped 2; matched 3, rewrote 2")
    assert "the program" not in [refusal.site for refusal in plan.refusals]


def test_fewer_than_asked_for_is_said_with_the_reasons() -> None:
    program = capture(ResNet().eval(), torch.randn(2, 3, 8, 8))
    plan = plan_of(program, blocks=9, skip=("blocks.0*",))
    assert (plan.asked, len(plan.dropped)) == (9, 2)
    assert plan.to_json()["asked"] == 9
    assert plan.summary().startswith("asked for 9, dropped 2; ")
    note = plan.refusals[-1]
    assert (note.site, note.reason) == (
        "the program",
        "9 branches were asked for and 2 went, as no other can go (1 x named in skip)",
    )


def test_blocks_inside_a_block_that_went_are_not_there_to_go() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.outer.weight.data.zero_()
            self.outer.bias.data.zero_()

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x).relu()
            return x + self.outer(x + self.inner(x))

    program = capture(Nested(), torch.randn(2, 4))
    assert len(names(program)) == 2
    ctx = Context(original=program, samples=TensorSamples((torch.randn(8, 4),)))
    plan = DropBlocks(DropBlocksOptions(blocks=2)).plan(program, ctx)
    assert plan.sites == ("outer:mlp",)
    assert plan.refusals[-1].reason == "2 branches were asked for and 1 went, as no other can go"


def test_a_share_is_the_one_that_was_written() -> None:
    assert DropBlocks(DropBlocksOptions(ratio=0.29))._asked(100) == 29


def test_what_cannot_go_anyway_may_be_named_in_skip() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd, self.even = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.odd(x.relu()) - x.relu()
            x = self.odd(x) - x
            return x + self.even(x)

    plan = plan_of(capture(Odd(), torch.randn(2, 4)), blocks=1, skip=("odd*",))
    assert plan.sites == ("even:mlp",)


# What is a shortcut


class Parallel(nn.Module):
    """Attention and feed-forward added in place, then dropout over both; weights are stored transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(5, WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.up, self.down = Attention(), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for _ in range(2):
            y = self.norm(x)
            z = F.gelu(y @ self.up.weight.T) @ self.down.weight.T
            z += self.attn(y)
            x = x + F.dropout(z, 0.1, self.training)
        return x


class Hourglass(nn.Module):
    """Residual blocks at two resolutions, the lower one inside a branch of the upper."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, WIDTH, 1), ConvBlock(WIDTH, WIDTH)
        self.down, self.low = ConvBlock(WIDTH, WIDTH), ConvBlock(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        low = self.low(self.down(F.max_pool2d(x, 2)))
        return self.up(x) + F.interpolate(low, scale_factor=2.0)


class Res2Net(nn.Module):
    """Splits of the channels, each convolved with what came of the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Conv2d(3, WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)
        self.convs = nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        first, *others = x.chunk(4, 1)
        parts = [first]
        for conv, part in zip(self.convs, others, strict=True):
            parts.append(conv(part + parts[-1]).relu())
        return x + self.out(torch.cat(parts, 1))


class DenseUNet(nn.Module):
    """Concatenated skips around residual blocks, as in diffusion models: the block behind the join has a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, WIDTH, 1), nn.Conv2d(WIDTH, 3, 1)
        self.down, self.middle, self.join = ConvBlock(WIDTH, 12, 2), ConvBlock(12, 12), ConvBlock(20, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.interpolate(self.middle(self.down(x)), scale_factor=2.0)
        return self.head(self.join(torch.cat([x, y], 1)))


CASES = [
    (Parallel, (2, 6, 5), 4),
    (Hourglass, (2, 3, 8, 8), 3),
    (Res2Net, (2, 3, 8, 8), 1),
    (DenseUNet, (2, 3, 8, 8), 3),
]


@pytest.mark.parametrize(("model", "shape", "count"), CASES)
def test_dropping_any_of_them_is_the_same_as_adding_nothing(
    model: type[nn.Module], shape: tuple[int, ...], count: int
) -> None:
    torch.manual_seed(0)
    program = capture(model().double().eval(), torch.randn(shape, dtype=torch.float64))
    assert len(names(program)) == count
    for blocks in range(1, count + 1):
        plan = plan_of(program, blocks=blocks, criterion="random")
        assert len(plan.dropped) == blocks
        after = DropBlocks().apply(program, plan)
        expected = _with_zeros(program, plan.dropped)
        torch.testing.assert_close(after(*program.example_args), expected, rtol=1e-12, atol=1e-12)


def _with_zeros(program: Program, results: tuple[str, ...]) -> object:
    """Run `program` with the results of branches replaced by zeros."""

    class Silencing(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            return torch.zeros_like(value) if n.name in results else value  # type: ignore[arg-type]

    with torch.no_grad():
        return Silencing(program.graph_module).run(*program.example_args)


def test_an_identity_is_no_part_of_a_branch_beside_a_single_layer() -> None:
    """In x + mlp(x) + adapter(x) the adapter is no projected shortcut that x + mlp(x) could go around."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mlp, self.adapter = nn.Linear(4, WIDTH), Mlp(), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x).relu()
            return x + self.mlp(x) + self.adapter(x)

    program = capture(Adapted().eval(), torch.randn(2, 4))
    assert sorted(names(program)) == ["adapter:mlp", "mlp:mlp"]
    left = DropBlocks().apply(program, plan_of(program, blocks=2))
    torch.testing.assert_close(left(*program.example_args), F.relu(_embedded(program)))


def _embedded(program: Program) -> Tensor:
    state = program.state_dict()
    return F.linear(*program.example_args, state["embed.weight"], state["embed.bias"])


def _stack(kind: str, blocks: int) -> fx.GraphModule:
    """Build the graph of many blocks: each added to the one before, or all to one value."""
    root = nn.Module()
    root.register_parameter("w", nn.Parameter(torch.randn(4, 4)))
    graph, value = fx.Graph(), torch.empty(2, 4)

    def call(target: object, *args: fx.Node) -> fx.Node:
        node = graph.call_function(target, args)  # type: ignore[arg-type]
        node.meta["val"] = value
        return node

    def block(x: fx.Node) -> fx.Node:
        w = graph.get_attr("w")
        w.meta["val"] = value.new_empty(4, 4)
        return call(aten.linear.default, x, w)

    source = graph.placeholder("x")
    source.meta["val"] = value
    x = first = call(aten.relu.default, source)
    for _ in range(blocks):
        x = call(aten.add.Tensor, x, block(x if kind == "chain" else first))
    graph.output((call(aten.relu.default, x),))
    return fx.GraphModule(root, graph)


def test_two_thousand_blocks() -> None:
    assert len(find_branches(_stack("chain", 2000))[0]) == 2000


def test_sums_of_many_terms_need_no_deep_stack() -> None:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 120)
    try:
        found = find_branches(_stack("one sum", 150))[0]
    finally:
        sys.setrecursionlimit(limit)
    assert len(found) == 150


def test_writes_in_place_behind_a_view_with_a_dynamic_batch_are_the_branchs_own() -> None:
    class Split(nn.Module):
        """What two reshapes read of the batch's size is no memory that they share."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layers = nn.Linear(4, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x).relu()
            for layer in self.layers:
                y = layer(x).relu_()
                x = x + y.reshape(x.shape[0], 2, 4).flip(1).reshape(x.shape[0], 8)
            return x

    program = capture(Split(), torch.randn(3, 4))
    assert names(program) == ["layers.0:mlp", "layers.1:mlp"]
