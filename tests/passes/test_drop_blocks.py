"""Residual branches: found without names, dropped exactly, the least important first, refused with reasons."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from graphopt.backends.onnxruntime import OnnxRuntimeBackend
from graphopt.capturing.capture import capture
from graphopt.errors import DataError, PassError, UsageError
from graphopt.ir.editor import Editor
from graphopt.ir.program import Program
from graphopt.measure.equivalence import OutputError, measure
from graphopt.passes.drop_blocks import DropBlocks, DropBlocksOptions, DropBlocksPlan
from graphopt.passes.residuals.branches import find_branches
from graphopt.passes.residuals.removal import without
from graphopt.pipeline.context import Context
from graphopt.pipeline.options import build
from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.runner import run
from graphopt.testing import TensorSamples, assert_same_program, check_pass
from tests.models import Dense, OptionA, UNet, WritesThroughViews
from tests.passes.residual_models import (
    ConvNeXtBlock,
    Layer,
    Nested,
    ResNet,
    Transformer,
    every_kind,
    example,
)

MODELS = every_kind()
ROUNDING = 1e-5  # float32, a few dozen operations in another order


@functools.cache
def captured(model: nn.Module) -> Program:
    return capture(model.eval(), example(model))


def names(model: nn.Module | Program) -> list[str]:
    program = model if isinstance(model, Program) else captured(model)
    return [branch.name for branch in find_branches(program.graph_module)[0]]


def plan_of(options: DropBlocksOptions, program: Program, data: tuple[Tensor, ...] | None = None) -> DropBlocksPlan:
    samples = TensorSamples(data) if data is not None else None
    return DropBlocks(options).plan(program, Context(original=program, samples=samples))


def reasons(plan: DropBlocksPlan) -> dict[str, str]:
    return {refusal.site: refusal.reason for refusal in plan.refusals}


def silenced(program: Program, result: str) -> Program:
    """Return `program` with the result of a branch multiplied by zero: what dropping it must compute."""
    program = program.copy()
    editor = Editor(program.graph_module, "test")
    node = next(node for node in program.graph.nodes if node.name == result)
    with editor.graph.inserting_after(node):
        zero = editor.call(torch.ops.aten.mul.Tensor, node, 0.0, like=node)
    node.replace_all_uses_with(zero, delete_user_cb=lambda user: user is not zero)
    return program.with_graph(editor.finish())


# What is found


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("pre", ["layers.0.attn:attention", "layers.0.mlp:mlp", "layers.1.attn:attention", "layers.1.mlp:mlp"]),
        ("post", ["layers.0.attn:attention", "layers.0.mlp:mlp", "layers.1.attn:attention", "layers.1.mlp:mlp"]),
        ("parallel", ["layers.0.attn:attention", "layers.0.mlp:mlp", "layers.1.attn:attention", "layers.1.mlp:mlp"]),
        ("joined", ["layers.0.attn:attention", "layers.0.mlp:mlp", "layers.1.attn:attention", "layers.1.mlp:mlp"]),
        ("masked", ["layers.0.attn:attention", "layers.0.mlp:mlp", "layers.1.attn:attention", "layers.1.mlp:mlp"]),
        ("resnet", ["blocks.0:convolution", "blocks.1:convolution", "blocks.2:convolution"]),
        ("nested", ["body.0:convolution", "body.1:convolution", "tail:convolution"]),
        ("inverted", ["body.0:convolution", "body.1:convolution", "tail:convolution"]),
    ],
)
def test_every_shape_of_branch_is_found(model: str, expected: list[str]) -> None:
    assert sorted(names(MODELS[model])) == sorted(expected)


def test_a_shortcut_without_weights_that_widens() -> None:
    assert names(capture(OptionA().eval(), torch.randn(2, 3, 8, 8))) == ["body:convolution"]


def test_encoder_states_and_masks_may_come_from_elsewhere() -> None:
    layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True).eval()
    found = names(capture(layer, (torch.randn(2, 5, 8), torch.randn(2, 7, 8))))
    assert len(found) == 3


def test_sums_that_are_no_blocks() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.slope = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            x = x - x.mean(-1, keepdim=True)  # a norm by hand
            x = x + self.slope * x.sin() ** 2  # an activation
            x = self.a(x) + self.b(x)  # two of a kind
            gate = self.a(x).sigmoid()
            return gate * x + (1 - gate) * x.tanh()  # a gate

    assert names(capture(Sums(), torch.randn(2, 4))) == []


def test_a_bias_of_attention_scores_is_no_shortcut() -> None:
    """Scores of the second layer are computed from what the bias has gone into; they are no branch around it."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.ModuleList(nn.Linear(4, 4) for _ in range(2)), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            distance = x.mean(-1)
            bias = distance[:, :, None] - distance[:, None, :]
            for q in self.q:
                x = (q(x) @ self.k(x).transpose(1, 2) + bias).softmax(-1) @ x
            return x

    assert names(capture(Biased(), torch.randn(2, 6, 4))) == []


# Given / Expected


def test_dropping_leaves_the_shortcut() -> None:
    class Given(nn.Module):
        def __init__(self, whole: bool) -> None:
            super().__init__()
            self.whole = whole
            self.embed, self.layer, self.head = nn.Linear(5, 8), Layer("pre"), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            if self.whole:
                x = x + self.layer.scale1 * self.layer.attn(self.layer.norm1(x))
            return self.head(x + self.layer.scale2 * self.layer.mlp(self.layer.norm2(x)))

    x = torch.randn(2, 6, 5)
    given = capture(Given(True).eval(), x)
    plan = plan_of(DropBlocksOptions(blocks=1, criterion="last", only=("layer.attn:*",)), given)
    found = DropBlocks(DropBlocksOptions()).apply(given, plan)
    assert_same_program(found, capture(Given(False).eval(), x), compare_tensors=False)
    assert not [name for name in found.state_dict() if "attn" in name or "norm1" in name]


@pytest.mark.parametrize("model", MODELS)
def test_dropping_is_the_same_as_adding_nothing(model: str) -> None:
    program = captured(MODELS[model])
    found, _ = find_branches(program.graph_module)
    for branch in found:
        dropped = without(program, [branch.result.name], "drop_blocks")
        expected = silenced(program, branch.result.name)
        error = measure(expected, dropped.call_flat, program.flat_examples())
        assert error.relative < ROUNDING, branch.name
        assert len(dropped.graph.nodes) < len(program.graph.nodes) - len(branch.nodes)
        assert error.relative < measure(program, dropped.call_flat, program.flat_examples()).relative


@pytest.mark.parametrize(
    ("model", "criterion"),
    [
        ("pre", "influence"),
        ("post", "last"),
        ("parallel", "random"),
        ("joined", "output"),
        ("masked", "random"),
        ("resnet", "output"),
        ("nested", "influence"),
        ("inverted", "last"),
    ],
)
def test_keeps_the_contract(model: str, criterion: str) -> None:
    options = build("drop_blocks", DropBlocksOptions, {"ratio": 0.7, "criterion": criterion})
    program = captured(MODELS[model])
    data = tuple(x.repeat(4, *[1] * (x.dim() - 1)) for x in program.flat_examples())
    checked = check_pass(DropBlocks(options), program, (), data=data, idempotent=False)
    assert len(checked.plan.sites) == int(0.7 * len(names(program)))
    assert sum(p.numel() for p in checked.after.parameters()) < sum(p.numel() for p in program.parameters())


def test_a_projected_shortcut_stays() -> None:
    program = captured(MODELS["resnet"])
    plan = plan_of(DropBlocksOptions(blocks=1, criterion="last", only=("blocks.1:*",)), program)
    left = DropBlocks().apply(program, plan).state_dict()
    assert "blocks.1.shortcut.0.weight" in left
    assert "blocks.1.conv1.weight" not in left


def test_parallel_branches_can_all_go() -> None:
    for style in ("parallel", "joined"):
        program = captured(MODELS[style])
        plan = plan_of(DropBlocksOptions(blocks=4, criterion="last"), program)
        left = DropBlocks().apply(program, plan).state_dict()
        assert {name.split(".")[0] for name in left} == {"embed", "norm", "head"}


def test_what_others_read_stays() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.q, self.k, self.out = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.embed(x)
            keys = self.k(x)
            return x + self.out(F.scaled_dot_product_attention(self.q(x), keys, keys)), keys

    program = capture(Cached(), torch.randn(2, 6, 8))
    plan = plan_of(DropBlocksOptions(blocks=1, criterion="last"), program)
    after = DropBlocks().apply(program, plan)
    assert {name.split(".")[0] for name in after.state_dict()} == {"embed", "k"}
    torch.testing.assert_close(after(*program.example_args)[1], program(*program.example_args)[1])


def test_a_block_takes_along_what_is_inside() -> None:
    model = Nested()
    model.tail.weight.data.zero_()
    model.tail.bias.data.zero_()
    program = captured(model)
    plan = plan_of(DropBlocksOptions(blocks=1), program, (torch.randn(8, 3, 8, 8),))
    assert plan.sites == ("tail:convolution",)
    assert plan.refusals == ()
    assert {n.split(".")[0] for n in DropBlocks().apply(program, plan).state_dict()} == {"stem", "head"}


def test_without_data_inner_blocks_go_first() -> None:
    plan = plan_of(DropBlocksOptions(blocks=2, criterion="last"), captured(MODELS["nested"]))
    assert set(plan.sites) == {"body.0:convolution", "body.1:convolution"}


# Which ones go


@pytest.mark.parametrize("criterion", ["output", "influence"])
@pytest.mark.parametrize("rescore", [True, False])
def test_the_branch_that_does_nothing_goes_first(criterion: str, rescore: bool) -> None:
    torch.manual_seed(1)
    model = Transformer("pre")
    model.layers[1].scale1.data.fill_(1e-4)
    options = build("drop_blocks", DropBlocksOptions, {"blocks": 1, "criterion": criterion, "rescore": rescore})
    data = torch.randn(16, 6, 5)
    checked = check_pass(DropBlocks(options), captured(model), (), data=(data,), idempotent=False)
    assert checked.plan.sites == ("layers.1.attn:attention",)
    torch.testing.assert_close(checked.after(data), checked.before(data), atol=1e-3, rtol=1e-3)
    assert "it contributes" in reasons(checked.plan)["layers.0.mlp:mlp"]  # type: ignore[arg-type]


def test_outputs_stay_within_the_sqnr_asked_for() -> None:
    torch.manual_seed(2)
    model = Transformer("pre")
    for layer, scale in zip(model.layers, (0.01, 0.3), strict=True):
        layer.scale1.data.fill_(scale)
        layer.scale2.data.fill_(scale)
    program, data = captured(model), torch.randn(32, 6, 5)
    plan = plan_of(DropBlocksOptions(sqnr=20), program, (data,))
    after = DropBlocks().apply(program, plan)
    assert {"layers.0.attn:attention", "layers.0.mlp:mlp"} <= set(plan.sites) != set(names(program))
    assert measure(program, after.call_flat, (data,)).sqnr >= 20
    assert all("dB from the original's" in reason for reason in reasons(plan).values())


def test_the_sqnr_asked_for_holds_on_samples_that_nothing_was_chosen_by() -> None:
    class Rare(nn.Module):
        """A branch that answers to large inputs only."""

        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4, bias=False)
            nn.init.constant_(self.up.weight, 1.0)
            nn.init.constant_(self.up.bias, -16.0)
            nn.init.constant_(self.down.weight, 1.0)

        def forward(self, x: Tensor) -> Tensor:
            x = 2 * x
            return x + self.down(torch.relu(self.up(x)))

    small, large = torch.rand(16, 4), 3 + torch.rand(16, 4)
    program = capture(Rare().eval(), (small[:2],))

    def plan(held_out: Tensor) -> DropBlocksPlan:
        ctx = Context(original=program, samples=TensorSamples((small,)), held_out=TensorSamples((held_out,)))
        return DropBlocks(DropBlocksOptions(sqnr=20)).plan(program, ctx)

    assert len(plan(small).sites) == 1
    assert plan(large).sites == ()
    assert "dB from the original's" in plan(large).refusals[0].reason


def test_rescoring_sees_what_a_drop_changes() -> None:
    """Two branches that cancel: each matters while the other is there."""

    class Cancelling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.b.weight.data, self.b.bias.data = -2 * self.a.weight.data, -2 * self.a.bias.data
            self.c.weight.data, self.c.bias.data = 1.01 * self.a.weight.data, 1.01 * self.a.bias.data

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.a(x) + self.b(x) + self.c(x))

    program, data = capture(Cancelling(), torch.randn(2, 4)), torch.randn(64, 4)
    plan = plan_of(DropBlocksOptions(blocks=3), program, (data,))
    assert len(plan.dropped) == 3
    scores = [float(str(plan.blocks[name]["score"])) for name in plan.sites]
    assert min(scores) < 1e-3


# Refused


def test_refusals_name_the_reason() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            one, two, three, four = self.layers
            x = one(x) - x
            x = torch.add(two(x), x, alpha=2)
            y = three(x)
            small = x.mean(1, keepdim=True)
            z = four(small.expand(-1, 4)) + small
            return x + y + z, y

    found = reasons(plan_of(DropBlocksOptions(criterion="last"), capture(Odd(), torch.randn(2, 4))))
    assert found["layers.0:mlp"] == "the shortcut is subtracted"
    assert found["layers.1:mlp"] == "the shortcut is scaled by alpha=2"
    assert found["layers.2:mlp"].startswith("what it computes is also read elsewhere")
    assert found["layers.3:mlp"].startswith("the shortcut changes the shape: ")


def test_a_program_that_would_return_its_input() -> None:
    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.net(x)

    plan = plan_of(DropBlocksOptions(criterion="last"), capture(Denoiser(), torch.randn(2, 3, 8, 8)))
    assert reasons(plan) == {"net:convolution": "the program would return its input"}


def test_memory_that_others_see_is_left_alone() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layer = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            row = x[:, :2]
            y = x + self.layer(x)
            x.add_(1)
            return y * x + F.pad(row, (0, 2))

    plan = plan_of(DropBlocksOptions(criterion="last"), capture(Writes(), torch.randn(2, 4)))
    assert "writes in place to memory that others read" in reasons(plan)["layer:mlp"]


@pytest.mark.parametrize("model", [Dense, UNet, WritesThroughViews])
def test_no_branches_is_said(model: type[nn.Module]) -> None:
    inputs = torch.randn(2, 7) if model is WritesThroughViews else torch.randn(2, 3, 8, 8)
    plan = plan_of(DropBlocksOptions(), capture(model().eval(), inputs))
    assert plan.sites == ()
    assert "it has no residual branch" in plan.refusals[0].reason


def test_what_the_user_keeps() -> None:
    program = captured(MODELS["pre"])
    options = DropBlocksOptions(blocks=1, criterion="last", skip=("layers.0*",), kinds=("mlp",))
    plan = plan_of(options, program)
    assert plan.sites == ("layers.1.mlp:mlp",)
    assert reasons(plan)["layers.0.attn:attention"] == "named in skip"
    assert reasons(plan)["layers.1.attn:attention"] == "kind `attention` is not in kinds"
    nested = plan_of(DropBlocksOptions(criterion="last", skip=("body.0*",)), captured(MODELS["nested"]))
    assert reasons(nested)["tail:convolution"] == "`body.0:convolution` inside it is named in skip"


def test_bad_input_says_what_is_possible() -> None:
    program = captured(MODELS["resnet"])
    with pytest.raises(DataError, match=r"needs data .*criterion=last .*needs none"):
        plan_of(DropBlocksOptions(), program)
    with pytest.raises(PassError, match=r"cannot drop 2 branches: none of this model can go \(1 x it has no residual"):
        plan_of(DropBlocksOptions(blocks=2), capture(Dense().eval(), torch.randn(2, 3, 8, 8)))
    with pytest.raises(PassError, match=r"cannot drop 1 branch: none of this model can go \(3 x kind not chosen"):
        plan_of(DropBlocksOptions(blocks=1, kinds=("mlp",)), program)
    with pytest.raises(UsageError, match=r"`skip=layer9\*` matches no branch .* blocks\.0:convolution"):
        plan_of(DropBlocksOptions(skip=("layer9*",)), program)
    with pytest.raises(UsageError, match="blocks and ratio both say how many"):
        build("drop_blocks", DropBlocksOptions, {"blocks": "1", "ratio": "0.5"})
    plan = plan_of(DropBlocksOptions(blocks=1, criterion="last"), program)
    with pytest.raises(PassError, match="The plan belongs to another program"):
        DropBlocks().apply(captured(MODELS["pre"]), plan)


# Onwards


@pytest.mark.parametrize("model", ["resnet", "pre"])
def test_goes_on_through_the_other_passes_and_lowering(model: str, tmp_path: Path) -> None:
    program = captured(MODELS[model])
    backend = OnnxRuntimeBackend()
    x = program.flat_examples()[0]
    data = torch.randn(32, *x.shape[1:], generator=torch.Generator().manual_seed(3))
    ctx = Context(original=program, targets=(backend.description,), samples=TensorSamples((data,)))
    pipeline = Pipeline.parse("drop_blocks:blocks=1,prune:ratio=0.25:round_to=2,svd:rank=4:round_to=1,int8")
    result = run(pipeline, program, ctx).programs["onnxruntime"]
    artifact = backend.lower(result, tmp_path / "model.onnx")
    assert backend.verify(artifact, result) < 0.1
    after = DropBlocks().apply(program, plan_of(DropBlocksOptions(blocks=1), program, (data,)))
    target = torch.zeros(2, dtype=torch.long)
    trained = after.copy(share_tensors=False).train()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(trained(*program.example_args), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_names_need_no_modules() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            x = x.relu()
            return x + x @ self.w

    assert names(capture(Bare(), torch.randn(2, 4))) == ["matmul:mlp"]


def test_one_kind_of_block_side_by_side() -> None:
    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = ConvNeXtBlock()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x.relu())).mean((2, 3))

    assert names(capture(Ensemble().eval(), torch.randn(2, 8, 8, 8))) == ["block:convolution", "block:convolution#2"]


def test_the_models_are_what_they_are_called() -> None:
    assert isinstance(MODELS["resnet"], ResNet)
    assert MODELS["masked"](*example(MODELS["masked"])).shape == (2, 4)


class Chain(nn.Module):
    """Two branches one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        x = x + self.one(x)
        return x + self.two(x)


@pytest.mark.parametrize(
    "options", [{"criterion": "output"}, {"criterion": "influence"}, {"criterion": "last", "sqnr": 3.0}]
)
def test_data_that_nothing_can_be_measured_on_is_named(options: dict[str, object]) -> None:
    program = capture(Chain(), torch.randn(2, 4))
    with pytest.raises(DataError, match=r"The calibration data makes .* NaN or infinite"):
        plan_of(build("drop_blocks", DropBlocksOptions, options), program, (torch.full((4, 4), torch.nan),))


def test_outputs_that_are_all_zero_have_errors_all_the_same() -> None:
    silent, loud = nn.Linear(4, 4), nn.Linear(4, 4)
    with torch.no_grad():
        for model, value in ((silent, 0.0), (loud, 1e15)):
            model.weight.fill_(0)
            model.bias.fill_(value)
    x = torch.zeros(2, 4)
    assert OutputError(capture(silent, x), [(x,)]).of(capture(loud, x).call_flat) > 1e200
