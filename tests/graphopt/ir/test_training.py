"""Training mode: what eval capture switched off comes back on, and nothing else changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphopt.capturing.capture import capture
from graphopt.ir.training import set_training, training_flag


class Mixed(nn.Module):
    """A switchable BatchNorm and Dropout, a BatchNorm without statistics and a Dropout that is always on."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.batch_only = nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.batch_only(self.drop(self.norm(x)))


def flags(gm: torch.fx.GraphModule) -> list[object]:
    return [
        node.args[5 if "batch_norm" in node.name else 2] for node in gm.graph.nodes if training_flag(node) is not None
    ]


def test_training_switches_on_what_capture_switched_off_and_back() -> None:
    program = capture(Mixed(), torch.randn(6, 4))
    text = program.graph_module.code
    assert flags(program.graph_module) == [False, False, True]
    assert flags(program.train().graph_module) == [True, True, True]
    assert flags(program.eval().graph_module) == [False, False, True]
    assert program.graph_module.code == text


def test_a_copy_made_in_training_mode_goes_back_to_evaluation() -> None:
    program = capture(Mixed(), torch.randn(6, 4))
    twin = program.train().copy(share_tensors=False)
    assert flags(twin.eval().graph_module) == [False, False, True]


def test_batch_norm_learns_statistics_in_training_mode_only() -> None:
    program = capture(nn.Sequential(nn.BatchNorm1d(4)), torch.randn(6, 4))
    x = torch.randn(64, 4) + 3
    before = program.state_dict()["0.running_mean"].clone()
    program(x)
    assert torch.equal(program.state_dict()["0.running_mean"], before)
    program.train()(x)
    torch.testing.assert_close(program.state_dict()["0.running_mean"], 0.1 * x.mean(0))


def test_set_training_twice_is_once() -> None:
    gm = capture(Mixed(), torch.randn(6, 4)).graph_module
    set_training(gm, True)
    set_training(gm, True)
    set_training(gm, False)
    assert flags(gm) == [False, False, True]
