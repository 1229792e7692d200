"""Pairing by provenance after the real passes, and by structure where there is no common descent."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from graphopt.capturing.capture import capture
from graphopt.distillation.addresses import Tap, addresses
from graphopt.distillation.pairing import derived_from, pair_stages, pair_taps
from graphopt.distillation.taps import insert_taps
from graphopt.ir.editor import Editor
from graphopt.ir.operators import short_name
from graphopt.ir.program import Program
from graphopt.pipeline.context import Context
from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.runner import run
from tests.graphopt.distillation.models import Encoder, Mlp, ResidualNet, settled
from tests.passes.int8_models import quantized


@pytest.fixture(scope="module")
def teacher() -> Program:
    torch.manual_seed(0)
    return capture(settled(ResidualNet(), torch.randn(64, 3, 8, 8)), torch.randn(2, 3, 8, 8))


def optimised(program: Program, passes: str) -> Program:
    return run(Pipeline.parse(passes), program, Context(original=program)).programs[""]


def paired(teacher: Program, student: Program) -> tuple[dict[str, str], dict[str, str]]:
    taps = [Tap(address, node) for address, node in addresses(teacher).items()]
    pairs, refusals = pair_taps(teacher, student, taps)
    return {p.teacher.address: p.student.address for p in pairs}, {r.site: r.reason for r in refusals}


def assert_equal_values(
    teacher: Program, student: Program, pairs: Mapping[str, str], inputs: tuple[Tensor, ...]
) -> None:
    """Run both with every pair tapped and compare the values: what pairs after an exact pass is equal."""
    of_teacher, of_student = addresses(teacher), addresses(student)
    _, wanted = insert_taps(teacher, [Tap(at, of_teacher[at]) for at in pairs])(*inputs)
    _, found = insert_taps(student, [Tap(at, of_student[to]) for at, to in pairs.items()])(*inputs)
    for address, value in wanted.items():
        torch.testing.assert_close(
            found[address], value, rtol=1e-4, atol=1e-4, msg=lambda text, at=address: f"{at}: {text}"
        )


def test_an_untouched_program_pairs_with_itself(teacher: Program) -> None:
    pairs, left = paired(teacher, teacher.copy())
    assert not left
    assert pairs.pop("drop:dropout") == ":mean"  # off in evaluation: the same value
    assert all(at == to for at, to in pairs.items())


def test_after_fold_the_convolution_stands_for_the_norm(teacher: Program) -> None:
    student = optimised(teacher, "fold")
    pairs, left = paired(teacher, student)
    assert pairs["layer1.bn1:batch_norm"] == "layer1.conv1:conv2d"
    assert left["layer1.conv1:conv2d"] == "no value of the student stands for it: a pass merged it away"
    assert_equal_values(teacher, student, pairs, (torch.randn(3, 3, 8, 8),))


def test_after_prune_every_value_stands_for_itself(teacher: Program) -> None:
    student = optimised(teacher, "prune:ratio=0.5:round_to=1")
    pairs, left = paired(teacher, student)
    assert not left
    assert pairs["layer1.conv1:conv2d"] == "layer1.conv1:conv2d"
    assert pairs["layer2:add"] == "layer2:add"


def test_after_svd_the_second_factor_stands_for_the_layer() -> None:
    torch.manual_seed(0)
    teacher = capture(Mlp(), torch.randn(2, 24))
    student = optimised(teacher, "svd:rank=8")
    pairs, left = paired(teacher, student)
    assert not left
    assert pairs["first:linear"] == "first:linear#1"
    assert pairs["second:linear"] == "second:linear#1"  # its input is a factorised layer as well
    assert pairs[":relu"] == ":relu"


def test_after_prune_svd_and_fold_together(teacher: Program) -> None:
    student = optimised(teacher, "prune:ratio=0.5:round_to=1,svd:rank=2,fold")
    pairs, _ = paired(teacher, student)
    assert pairs["layer1.bn2:batch_norm"] == "layer1.conv2:conv2d"
    assert pairs["layer2.relu:relu#1"] == "layer2.relu:relu#1"
    assert derived_from(student, teacher)


class NormFirst(nn.Module):
    """A norm that goes into the layer after it, since the value before it has no weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.conv = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(self.stem(x).relu())).relu()


def test_a_relu_that_integers_clamp_stands_where_it_did(teacher: Program) -> None:
    program = run(Pipeline.parse("fold"), teacher, Context(original=teacher)).programs[""]
    stored, plan = quantized(program, torch.randn(16, 3, 8, 8))
    assert plan.dropped
    relus = [node.name for node in teacher.graph.nodes if short_name(node) == "relu"]
    pairs, refusals = pair_taps(teacher, stored, [Tap(name, name) for name in relus])
    assert [pair.teacher.node for pair in pairs] == relus
    assert refusals == []


def test_a_norm_folded_forward_leaves_the_value_before_it_as_it_was() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 4, 4)
    teacher = capture(settled(NormFirst(), x), x)
    student = optimised(teacher, "fold")
    pairs, left = paired(teacher, student)
    assert pairs[":relu#0"] == ":relu#0"
    assert list(left) == ["norm:batch_norm"]
    assert_equal_values(teacher, student, pairs, (x,))


class ViewBetween(nn.Module):
    """A norm that goes into the linear layer before it, through a permutation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x).transpose(1, 2)).relu()


def test_a_norm_folded_backward_through_a_view() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 6, 3)
    model = ViewBetween()
    model.norm.running_var.uniform_(0.5, 2)
    model.norm.running_mean.uniform_(-1, 1)
    teacher = capture(model, x)
    student = optimised(teacher, "fold")
    pairs, left = paired(teacher, student)
    assert "linear:linear" in left  # its weight took in the scale
    assert_equal_values(teacher, student, pairs, (x,))


def test_a_removed_block_leaves_its_input_to_stand_for_the_sum(teacher: Program) -> None:
    student = teacher.copy()
    editor = Editor(student.graph_module, "drop")
    add = next(node for node in student.graph.nodes if node.name == "add_1")
    skip = next(source for source in add.all_input_nodes if source.name == "conv2d_3")
    editor.replace(add, skip)
    pairs, left = paired(teacher, student.with_graph(editor.finish()))
    assert pairs["layer2:add"] == "down:conv2d"
    assert "layer2.bn2:batch_norm" in left


def test_another_model_is_not_a_descendant(teacher: Program) -> None:
    other = capture(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), torch.randn(2, 3, 8, 8))
    assert not derived_from(other, teacher)


def test_stages_pair_programs_of_different_descent(teacher: Program) -> None:
    torch.manual_seed(1)
    other = capture(ResidualNet(inner=3), torch.randn(2, 3, 8, 8))
    pairs = pair_stages(teacher, other)
    assert [pair.teacher.address for pair in pairs] == ["layer1.relu:relu#1", "layer2.relu:relu#1"]
    assert [pair.student.address for pair in pairs] == ["layer1.relu:relu#1", "layer2.relu:relu#1"]


def test_stages_that_are_not_equally_many_pair_by_their_sizes() -> None:
    def chain(*strides: int) -> Program:
        layers = [(nn.Conv2d(3 if not at else 4, 4, 3, stride, 1), nn.ReLU()) for at, stride in enumerate(strides)]
        torch.manual_seed(0)
        return capture(
            nn.Sequential(*(part for pair in layers for part in pair), nn.Flatten()), torch.randn(2, 3, 32, 32)
        )

    long, short = chain(1, 2, 2, 2, 1), chain(1, 3, 3, 1)  # 32, 16, 8, 4 and 32, 11, 4
    paired = [(pair.teacher.address, pair.student.address) for pair in pair_stages(long, short)]
    assert paired == [("1:relu", "1:relu"), ("5:relu", "3:relu"), ("9:relu", "7:relu")]
    assert [(pair.student.address, pair.teacher.address) for pair in pair_stages(short, long)] == paired


def test_one_stage_spreads_the_student_over_the_teacher() -> None:
    inputs = (torch.randint(0, 11, (2, 6)), torch.ones(2, 6, dtype=torch.long))
    deep, shallow = capture(Encoder(layers=4), inputs), capture(Encoder(layers=2), inputs)
    spread = [(pair.teacher.address, pair.student.address) for pair in pair_stages(deep, shallow)]
    assert spread == [
        ("layers.0:add#2", "layers.0:add#1"),
        ("layers.1:add#2", "layers.0:add#2"),
        ("layers.2:add#2", "layers.1:add#1"),
        ("layers.3:add#2", "layers.1:add#2"),
    ]
    reverse = [(pair.student.address, pair.teacher.address) for pair in pair_stages(shallow, deep)]
    assert reverse == spread
