"""Cut points and block boundaries, on networks with branches, masks, several outputs and none of these."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphopt.capturing.capture import capture
from graphopt.distillation.cuts import auto_taps, flow, residual_points, stage_ends
from graphopt.ir.program import Program
from tests.graphopt.distillation.models import Encoder, Mlp, ResidualNet


@pytest.fixture(scope="module")
def residual() -> Program:
    return capture(ResidualNet(), torch.randn(2, 3, 8, 8))


def listed(program: Program, limit: int = 100) -> list[str]:
    return [tap.address for tap in auto_taps(program, limit)]


def test_cut_points_leave_out_what_a_shortcut_goes_around(residual: Program) -> None:
    (chain,) = flow(residual).chains
    names = [node.name for node in chain]
    assert names[:3] == ["conv2d", "batch_norm", "relu"]
    assert "conv2d_1" not in names
    assert names[-1] == "linear"


def test_block_boundaries_of_a_residual_network(residual: Program) -> None:
    assert listed(residual) == ["layer1.relu:relu#1", "layer2.relu:relu#1"]


def test_stages_end_where_the_spatial_size_changes(residual: Program) -> None:
    assert [node.name for node in stage_ends(residual)] == ["relu_2", "relu_4"]


def test_a_mask_from_outside_opens_no_way_around_a_block() -> None:
    tokens = torch.randint(0, 11, (2, 6))
    program = capture(Encoder(), (tokens, torch.ones(2, 6, dtype=torch.long)))
    assert listed(program) == ["layers.0:add#1", "layers.0:add#2", "layers.1:add#1", "layers.1:add#2"]
    assert len(stage_ends(program)) == 1


def test_a_chain_without_branches_gives_the_inputs_of_its_layers() -> None:
    program = capture(Mlp(), torch.randn(2, 24))
    assert listed(program) == ["first:linear", ":relu"]


def test_a_limit_spreads_evenly_and_keeps_the_last(residual: Program) -> None:
    tokens = torch.randint(0, 11, (2, 6))
    program = capture(Encoder(layers=3), (tokens, torch.ones(2, 6, dtype=torch.long)))
    assert listed(program, 2) == ["layers.1:add#1", "layers.2:add#2"]
    assert listed(residual, 1) == ["layer2.relu:relu#1"]


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.left, self.right = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.trunk(x).relu()
        return self.left(x), self.right(x)


def test_the_fork_before_two_heads_is_found_once() -> None:
    assert listed(capture(TwoHeads(), torch.randn(2, 4))) == [":relu"]


class Weightless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu() + x


def test_a_program_without_weights_has_no_cut_points() -> None:
    program = capture(Weightless(), torch.randn(2, 4))
    assert flow(program).chains == ((),)
    assert residual_points(program) == []
    assert auto_taps(program, 4) == []
