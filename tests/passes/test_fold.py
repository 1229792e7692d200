"""Folding is exact, says what it leaves alone, and never loses a write, a reader or a shared weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.backends.onnxruntime import OnnxRuntimeBackend
from graphopt.capturing.capture import capture
from graphopt.errors import PassError
from graphopt.ir.editor import Editor
from graphopt.ir.program import Program
from graphopt.ir.provenance import origin
from graphopt.passes.fold import Fold, FoldPlan, FoldRound
from graphopt.passes.folding.constant_folding import ConstantFold
from graphopt.pipeline.context import Context
from graphopt.testing import CheckedPass, assert_same_program, check_pass, run_pass
from tests.models import WeightNormed, WritesThroughViews, example

aten = torch.ops.aten
EXACT = 1e-12  # float64: a few roundings of 2^-53 in each of at most 20 layers


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(model: nn.Module) -> nn.Module:
    """Randomise all parameters and statistics: a BatchNorm at its defaults hides every mistake."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("running_var"):
            tensor.data.uniform_(0.5, 2.0, generator=generator)
        elif tensor.is_floating_point():
            tensor.data.normal_(0.3, 0.5, generator=generator)
    return model.eval()


def fold_exactly(model: nn.Module, *inputs: Tensor) -> CheckedPass:
    """Check the contract in float32 and the meaning in float64, at another batch size too."""
    seeded(model)
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    program = capture(model.double(), exact)
    folded = run_pass(Fold(), program, ())
    for args in (exact, [torch.cat([x, x, x]) for x in exact] if program.batch_size is None else exact):
        with torch.no_grad():
            torch.testing.assert_close(folded(*args), model(*args), rtol=EXACT, atol=EXACT)
    return check_pass(Fold(), model.float(), [x.float() if x.is_floating_point() else x for x in inputs])


def operators(program: Program) -> list[str]:
    return [str(n.target).split(".")[1] for n in program.graph.nodes if n.op == "call_function"]


def reasons(checked: CheckedPass) -> dict[str, str]:
    return {refusal.site: refusal.reason for refusal in checked.plan.refusals}


class ConvNorm(nn.Module):
    def __init__(self, conv: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


# Given / Expected


def test_a_norm_and_a_dropout_behind_a_convolution_go_and_a_bias_appears() -> None:
    given = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.Dropout(0.3), nn.BatchNorm2d(6), nn.ReLU())
    expected = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
    x = noise(2, 3, 5, 5)
    checked = fold_exactly(given, x)
    assert_same_program(checked.after, capture(expected, x), compare_tensors=False)
    norm, conv = given[2], given[0]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    state = checked.after.state_dict()
    torch.testing.assert_close(state["0.weight"], (conv.weight * scale[:, None, None, None]).detach())
    torch.testing.assert_close(state["0.bias"], (norm.bias - norm.running_mean * scale).detach())
    assert checked.plan.sites == ("dropout", "batch_norm")


def test_a_written_mask_becomes_a_stored_one() -> None:
    class Expected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([[0.0, -1.0, -1.0], [0.0, 0.0, -1.0], [0.0, 0.0, 0.0]]))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mask

    class Given(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mask = x.new_zeros(3, 3)
            mask[0, 1:].fill_(-1.0)
            mask[1, 2:] = -1.0
            return x + mask

    checked = fold_exactly(Given(), noise(2, 3, 3))
    assert_same_program(checked.after, capture(Expected(), noise(2, 3, 3)))


def test_weight_norm_becomes_a_plain_trainable_weight() -> None:
    given = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
    checked = fold_exactly(given, noise(2, 6))
    assert_same_program(checked.after, capture(nn.Linear(6, 4), noise(2, 6)), compare_tensors=False)
    assert {name for name, _ in checked.after.graph_module.named_parameters()} == {"weight", "bias"}


# Every layer a norm can follow

LAYERS: list[tuple[nn.Module, nn.Module, tuple[int, ...]]] = [
    (nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6), (2, 4, 7)),
    (nn.Conv2d(4, 6, 3, groups=2, stride=2), nn.BatchNorm2d(6), (2, 4, 7, 7)),
    (nn.Conv2d(4, 8, 3, groups=4, padding="same", bias=False), nn.BatchNorm2d(8, affine=False), (2, 4, 5, 5)),
    (nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), (2, 2, 4, 4, 4)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2), nn.BatchNorm1d(6), (2, 4, 5)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    (nn.ConvTranspose3d(2, 4, 2, bias=False), nn.BatchNorm3d(4), (2, 2, 3, 3, 3)),
    (nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), (2, 5)),
    (nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (2, 3, 5, 5)),
    (nn.Conv1d(3, 4, 3), nn.InstanceNorm1d(4, track_running_stats=True), (2, 3, 5)),
]


@pytest.mark.parametrize(("layer", "norm", "shape"), LAYERS)
def test_a_norm_folds_into_every_layer_before_it(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> None:
    checked = fold_exactly(ConvNorm(layer, norm), noise(*shape))
    assert not {"batch_norm", "instance_norm"}.intersection(operators(checked.after))
    assert not checked.plan.refusals


@pytest.mark.parametrize(
    ("norm", "layer", "shape"),
    [
        (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7)),
        (nn.BatchNorm1d(4), nn.Conv1d(4, 4, 3, groups=4, bias=False), (2, 4, 7)),
        (nn.BatchNorm1d(5), nn.Linear(5, 6), (2, 5)),
    ],
)
def test_a_norm_folds_into_the_layer_after_it(norm: nn.Module, layer: nn.Module, shape: tuple[int, ...]) -> None:
    checked = fold_exactly(nn.Sequential(norm, layer), noise(*shape))
    assert "batch_norm" not in operators(checked.after)


def test_scales_and_shifts_fold_like_norms() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3, padding=1)
            self.conv = nn.Conv2d(4, 6, 1, bias=False)
            self.gamma, self.beta = nn.Parameter(torch.zeros(6, 1, 1)), nn.Parameter(torch.zeros(1, 6, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.stem(x / 255.0))
            return (self.gamma * self.conv(y) + self.beta - 0.5) * 2

    checked = fold_exactly(Scaled(), noise(2, 3, 4, 4) * 255)
    assert operators(checked.after) == ["conv2d", "relu", "conv2d"]


def test_a_norm_is_found_through_views_and_permutations() -> None:
    class Through(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 6), nn.Linear(6, 6)
            self.flat, self.turned = nn.BatchNorm1d(6), nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:  # (N, L, 5), as LeViT and PointNet do it
            y = self.one(x)
            y = self.flat(y.flatten(0, 1)).reshape_as(y)
            return self.turned(self.two(torch.relu(y)).transpose(1, 2))

    checked = fold_exactly(Through(), noise(2, 3, 5))
    assert "batch_norm" not in operators(checked.after)


def test_decomposed_batch_norms_and_convolutions_fold_too() -> None:
    model = seeded(ConvNorm(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    program = capture(model, noise(2, 3, 5, 5)).copy()
    editor = Editor(program.graph_module, "made")
    conv, norm = (n for n in program.graph.nodes if n.op == "call_function")
    with program.graph.inserting_before(norm):
        plain = editor.call(aten.convolution.default, *conv.args, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, like=conv)
        several = editor.call(
            aten._native_batch_norm_legit_no_training.default, plain, *norm.args[1:5], 0.1, 1e-5, like=norm
        )
        import operator

        value = editor.call(operator.getitem, several, 0, like=norm)
    editor.replace(norm, value)
    checked = check_pass(Fold(), program.with_graph(editor.finish()), ())
    assert operators(checked.after) == ["convolution"]
    x = noise(3, 3, 5, 5, seed=4)
    torch.testing.assert_close(checked.after(x), model(x))


# Refusals


def test_a_norm_whose_convolution_has_another_reader_stays() -> None:
    class Read(ConvNorm):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y) + torch.relu(y)

    checked = fold_exactly(Read(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), noise(2, 3, 5, 5))
    assert reasons(checked) == {"batch_norm": "the output of `conv2d` has another reader (`relu`)"}
    assert not checked.plan.sites


def test_a_norm_whose_convolution_is_also_an_output_stays() -> None:
    class Both(ConvNorm):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            return self.norm(y), y

    checked = fold_exactly(Both(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), noise(2, 3, 5, 5))
    assert reasons(checked) == {"batch_norm": "the output of `conv2d` has another reader (an output of the program)"}


def test_a_norm_behind_a_concatenation_stays() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(7)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(torch.cat([x, self.conv(x)], 1))

    checked = fold_exactly(Dense(), noise(2, 3, 4, 4))
    assert reasons(checked) == {"batch_norm": "it follows `cat`, not a convolution or linear layer"}


def test_a_shift_does_not_pass_zero_padding_but_a_scale_does() -> None:
    padded = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1))
    checked = fold_exactly(padded, noise(2, 3, 5, 5))
    assert "its shift does not pass the border of `conv2d` after it" in reasons(checked)["batch_norm"]

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x * 0.25)

    assert operators(fold_exactly(Scale(), noise(2, 3, 5, 5)).after) == ["conv2d"]


def test_a_norm_over_another_axis_than_the_features_stays() -> None:
    checked = fold_exactly(ConvNorm(nn.Linear(5, 6), nn.BatchNorm1d(4)), noise(2, 4, 5))
    assert reasons(checked) == {"batch_norm": "it runs along axis 1, `linear` makes its features on axis 2"}


def test_a_norm_in_training_mode_stays() -> None:
    program = capture(seeded(ConvNorm(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), noise(2, 3, 5, 5)).train()
    plan = Fold().plan(program, Context(original=program))
    assert [r.reason for r in plan.refusals] == [
        "it is in training mode and normalises by the batch; call `program.eval()` first"
    ]


def test_a_norm_without_statistics_stays() -> None:
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    program = capture(seeded(ConvNorm(nn.Conv2d(3, 4, 3), norm)), noise(2, 3, 5, 5))
    plan = Fold().plan(program, Context(original=program))
    assert not plan.sites
    assert "normalises by the batch" in plan.refusals[0].reason


def test_a_norm_by_the_statistics_of_each_sample_stays() -> None:
    program = capture(seeded(ConvNorm(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True))), noise(2, 3, 5, 5))
    assert not Fold().plan(program, Context(original=program)).sites


def test_a_weight_that_would_overflow_is_refused() -> None:
    model = ConvNorm(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).half().eval()
    model.conv.weight.data.fill_(60000.0)
    model.norm.weight.data.fill_(60000.0)
    program = capture(model, noise(2, 3, 4, 4).half() * 0)
    plan = Fold().plan(program, Context(original=program))
    assert plan.refusals[0].reason == "the folded weight of `conv2d` would overflow float16"


def test_a_matrix_product_cannot_take_a_shift() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix, self.shift = nn.Parameter(torch.zeros(5, 4)), nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.matrix + self.shift

    assert reasons(fold_exactly(Shifted(), noise(2, 5))) == {"add": "`matmul` cannot take a bias"}


def test_a_constant_much_larger_than_what_it_is_computed_from_is_refused() -> None:
    class Grid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.row = nn.Parameter(torch.zeros(1, 1200))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.row * self.row.T).sin()

    checked = fold_exactly(Grid(), noise(2, 1200))
    assert reasons(checked)["sin"] == "it is constant, but it would store 5.49 MiB in place of 4.69 KiB"
    assert "sin" in operators(checked.after)


def test_random_numbers_are_never_folded() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0.0 * torch.rand(3)

    program = capture(Noisy(), noise(2, 3))
    assert "rand" in operators(run_pass(Fold(), program, ()))


def test_nothing_to_do_is_said() -> None:
    checked = check_pass(Fold(), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), noise(2, 4))
    assert checked.plan.sites == ()
    assert checked.plan.summary() == "matched 0, rewrote 0"


# At the edges: sharing


class Twice(nn.Module):
    """One convolution called twice, behind it one norm or two."""

    def __init__(self, *, same_norm: bool, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.first = nn.BatchNorm2d(width)
        self.second = self.first if same_norm else nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.conv(torch.relu(self.first(self.conv(x)))))


def test_a_weight_shared_with_its_norm_stays_shared() -> None:
    checked = fold_exactly(Twice(same_norm=True), noise(2, 4, 5, 5))
    assert set(checked.after.state_dict()) == {"conv.weight", "conv.bias"}


def test_a_small_weight_shared_between_two_norms_is_copied() -> None:
    checked = fold_exactly(Twice(same_norm=False), noise(2, 4, 5, 5))
    assert "batch_norm" not in operators(checked.after)
    assert len(checked.after.state_dict()) == 4


def test_a_large_weight_shared_between_two_norms_is_refused() -> None:
    checked = fold_exactly(Twice(same_norm=False, width=184), noise(2, 184, 2, 2))
    assert reasons(checked)["batch_norm"].startswith("the weight of `conv2d` is shared with `conv2d_1`; for a copy of")
    assert checked.plan.refusals[0].counted_as == "the weight of … is shared with …"


def test_a_weight_that_somebody_else_reads_is_not_scaled_under_him() -> None:
    class Read(ConvNorm):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) + self.conv.weight.sum() + self.conv.bias.sum()

    checked = fold_exactly(Read(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), noise(2, 3, 5, 5))
    assert "batch_norm" not in operators(checked.after)


def test_a_chain_of_norms_folds_in_rounds() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU())
    checked = fold_exactly(model, noise(2, 3, 7, 7))
    assert operators(checked.after) == ["conv2d", "relu"]
    assert isinstance(checked.plan, FoldPlan)
    assert len(checked.plan.rounds) == 2


def test_the_layer_says_whose_value_it_now_holds() -> None:
    after = fold_exactly(ConvNorm(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), noise(2, 3, 5, 5)).after
    known = origin(next(n for n in after.graph.nodes if n.target is aten.conv2d.default))
    assert known is not None
    assert (known.module, known.op, known.made_by, known.site) == ("conv", "conv2d", "fold", "batch_norm")


# At the edges: no-ops


class Operators(nn.Module):
    """Calls a function given by a test."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.call(torch.relu(x)))


NO_OPS = {
    "identity": lambda x: x.contiguous().clone().detach(),
    "arithmetic": lambda x: (x + 0) * 1.0 / 1 - 0,
    "views": lambda x: x.view(x.shape).reshape(x.shape).expand(-1, 4, 6).permute(0, 1, 2).transpose(1, 1),
    "slices": lambda x: x[:, :][:, 0:4],
    "casts": lambda x: x.to(torch.float32).type_as(x).float(),
    "padding": lambda x: torch.nn.functional.pad(x, [0, 0, 0, 0]).roll(0, 1),
    "pooling": lambda x: nn.functional.adaptive_avg_pool1d(nn.functional.max_pool1d(x, 1), 6),
    "repeats": lambda x: torch.cat([x]).repeat(1, 1, 1),
}


@pytest.mark.parametrize("name", NO_OPS)
def test_calls_that_return_their_input_go(name: str) -> None:
    checked = check_pass(Fold(), Operators(NO_OPS[name]), noise(2, 4, 6))
    assert operators(checked.after) == ["relu", "relu"]


NOT_NO_OPS = {
    "a transposition of a square": lambda x: x.transpose(1, 2),
    "a copy in another order": lambda x: x.transpose(1, 2).contiguous(),
    "another dtype": lambda x: x.to(torch.float64),
    "a slice with a step": lambda x: x[:, ::1][:, ::2],
    "a broadcast": lambda x: x[:, :1].expand(-1, 4, 4),
    "a shift": lambda x: x.roll(1, 1),
    "times one with another dtype": lambda x: (x > 0) * 1.0,
}


@pytest.mark.parametrize("name", NOT_NO_OPS)
def test_calls_that_change_something_stay(name: str) -> None:
    before = capture(Operators(NOT_NO_OPS[name]), noise(2, 4, 4))
    checked = check_pass(Fold(), before, ())
    assert len(operators(checked.after)) > 2
    x = noise(3, 4, 4, seed=2)
    assert torch.equal(checked.after(x), before(x))


def test_a_plan_that_drops_what_does_something_is_refused() -> None:
    program = capture(nn.Sequential(nn.Flatten(), nn.ReLU()), torch.randn(2, 3, 4))
    (name,) = [node.name for node in program.graph.nodes if node.target is aten.relu.default]
    plan = Fold().new_plan(sites=[name], rounds=(FoldRound(dropped=(name,)),))
    with pytest.raises(PassError, match=f"The plan drops `{name}`, which does something in this program"):
        Fold().apply(program, plan)


@pytest.mark.parametrize("stored", [torch.ones(1, 1), torch.ones(3, 4, dtype=torch.float64)])
def test_a_plan_that_stores_something_else_is_refused(stored: torch.Tensor) -> None:
    program = capture(nn.Linear(4, 3), torch.randn(2, 4))
    rounds = (FoldRound(constants=(ConstantFold("weight", "other", trainable=True),)),)
    with pytest.raises(PassError, match="for `weight`, which is another thing in this program"):
        Fold().apply(program, Fold().new_plan(sites=["weight"], rounds=rounds, tensors={"other": stored}))


def test_an_input_handed_to_an_output_keeps_its_call() -> None:
    checked = check_pass(Fold(), nn.Dropout(0.5), noise(2, 4))
    assert reasons(checked) == {"dropout": "it hands `input_1` straight to an output of the program"}


def test_a_copy_that_is_written_to_stays() -> None:
    class Written(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(x)
            copy = y.clone()
            copy[:, 0].fill_(7.0)
            return copy + y

    checked = check_pass(Fold(), Written(), noise(2, 4))
    assert "`fill_` writes to one side of it" in reasons(checked)["clone"]
    x = noise(3, 4, seed=2)
    assert torch.equal(checked.after(x), Written()(x))


# At the edges: constants


def test_a_constant_written_with_input_values_stays() -> None:
    class Cache(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            cache = torch.zeros(2, 4)
            cache[0] = x.sum(0)
            return x + cache.sum(0)

    model = Cache()
    checked = check_pass(Fold(), model, noise(2, 4))
    x = noise(3, 4, seed=2)
    assert torch.equal(checked.after(x), model(x))


def test_a_constant_read_before_its_last_write_stays() -> None:
    class Reused(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            scratch = torch.zeros(4)
            scratch[:2].fill_(1.0)
            y = x * scratch
            scratch[2:].fill_(5.0)
            return y + scratch

    checked = check_pass(Fold(), Reused(), noise(2, 4))
    x = noise(3, 4, seed=2)
    assert torch.equal(checked.after(x), Reused()(x))


def test_a_buffer_the_graph_writes_to_stays() -> None:
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("state", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.state.fill_(2.0)
            return x + self.state * 2

    folded = run_pass(Fold(), Stateful(), noise(2, 3)).copy(share_tensors=False)
    folded.state_dict()["state"].zero_()
    assert torch.equal(folded(torch.zeros(2, 3)), torch.full((2, 3), 4.0))
    assert torch.equal(folded.state_dict()["state"], torch.zeros(3)), "a program takes back what it writes"


def test_equal_constants_are_stored_once() -> None:
    class Masks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = torch.softmax(x + torch.full((4, 4), -1.0).triu(1), -1)
            return x

    checked = fold_exactly(Masks(), noise(2, 4, 4))
    assert len(checked.after.state_dict()) == 1


def test_uninitialised_memory_is_no_constant_until_it_is_filled() -> None:
    class Filled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.empty(3, 3).fill_(-2.0).triu(1)

    checked = fold_exactly(Filled(), noise(2, 3, 3))
    assert operators(checked.after) == ["add"]


def test_what_a_later_stage_removes_is_not_reported_as_left() -> None:
    class KeyBias(nn.Module):
        """As Swin v2: the middle third of a copied bias is set to zero."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            bias = self.qkv.bias.clone()
            bias[2:4].zero_()
            return nn.functional.linear(x, self.qkv.weight, bias)

    checked = fold_exactly(KeyBias(), noise(2, 4))
    assert operators(checked.after) == ["linear"]
    assert not checked.plan.refusals


def test_a_gathered_parameter_becomes_a_parameter() -> None:
    class RelativeBias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(7, 2))
            self.register_buffer("index", torch.arange(4)[:, None] - torch.arange(4) + 3)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1).contiguous()

    checked = fold_exactly(RelativeBias(), noise(2, 2, 4, 4))
    assert operators(checked.after) == ["add"]
    assert [tuple(p.shape) for p in checked.after.parameters()] == [(2, 4, 4)]


@pytest.mark.parametrize("model", [WeightNormed, WritesThroughViews])
def test_shared_test_models_fold_exactly(model: type[nn.Module]) -> None:
    fold_exactly(model(), example(model))


# Meaning, on networks nobody wrote down


class Random(nn.Module):
    """A random chain of layers, norms, scales and no-ops with residual connections."""

    def __init__(self, steps: list[int]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList(self._layer(step) for step in steps)

    def _layer(self, step: int) -> nn.Module:
        kinds = [
            lambda: nn.Conv2d(4, 4, 3, padding=1, bias=False),
            lambda: nn.Conv2d(4, 4, 1, groups=2),
            lambda: nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2),
            lambda: nn.BatchNorm2d(4),
            lambda: nn.BatchNorm2d(4, affine=False),
            lambda: nn.Dropout(0.2),
            nn.ReLU,
            nn.Identity,
        ]
        return kinds[step % len(kinds)]()

    def forward(self, x: Tensor) -> Tensor:
        earlier = x
        for step, layer in zip(self.steps, self.layers, strict=True):
            y = layer(x)
            if step >= 16:
                y = y * 0.5 + 0.25
            if step >= 24:
                y, earlier = y + earlier, y
            x = y
        return x


@given(st.lists(st.integers(0, 31), min_size=2, max_size=9))
@settings(max_examples=8, deadline=None)
def test_random_networks_fold_exactly(steps: list[int]) -> None:
    model = seeded(Random(steps)).double()
    x = noise(2, 4, 5, 5).double()
    checked = check_pass(Fold(), model, x)
    other = noise(3, 4, 5, 5, seed=9).double()
    with torch.no_grad():
        wanted, found = model(other), checked.after(other)
    scale = float(wanted.abs().max()) + 1
    assert float((wanted - found).abs().max()) < EXACT * scale * len(steps)


# Through the backend


def test_the_lowered_program_has_no_norm_and_no_mask_arithmetic(tmp_path: Path) -> None:
    import onnx

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.zeros(4, 4)
            mask[1:3].fill_(2.0)
            return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)) @ mask)

    program = run_pass(Fold(), seeded(Net()), noise(2, 3, 6, 6))
    backend = OnnxRuntimeBackend()
    artifact = backend.lower(program, tmp_path / "model.onnx")
    backend.verify(artifact, program)
    kinds = [node.op_type for node in onnx.load(artifact.path).graph.node]
    assert kinds.count("Conv") == 1
    assert not {"BatchNormalization", "ScatterND", "Expand", "Slice"} & set(kinds)


def test_a_python_constant_that_the_model_writes_to_is_the_same_at_every_call() -> None:
    class Counter(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            start = torch.tensor([0.0, 1.0, 2.0])
            start[0] += 1
            return x + start

    program = capture(Counter(), noise(2, 3))
    zeros = torch.zeros(1, 3)
    assert torch.equal(program(zeros), program(zeros))
    assert operators(check_pass(Fold(), program, ()).after) == ["add"]
