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


class Inside(Mixed):
    """What trains, in an autocast block, in a branch, or by an average over all batches."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.layer = where, nn.Linear(4, 4)
        self.norm.momentum = None if where == "average" else 0.2

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "branch":
            taken: Tensor = torch.cond(x.sum() > 0, lambda a: self.drop(self.norm(a)), lambda a: a * 2, (x,))
            return taken
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.where == "block"):
            return self.drop(self.norm(self.layer(x))).float()


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


def test_an_autocast_block_trains_like_the_models_own() -> None:
    torch.manual_seed(0)
    model = Inside("block").eval()
    program = capture(model, torch.randn(6, 4))
    assert program.notes == ()
    evaluated = program(torch.ones(3, 4))
    program.train()
    model.train()
    for seed in range(3):
        outputs, gradients = [], []
        for trained, weight in ((model, model.layer.weight), (program, program.graph_module.layer.weight)):
            torch.manual_seed(seed)
            x = torch.randn(16, 4) + seed
            outputs.append(trained(x))
            gradients.append(torch.autograd.grad(outputs[-1].square().sum(), weight)[0])
        assert torch.equal(*outputs)
        assert torch.equal(*gradients)
    state = program.state_dict()
    for name, tensor in model.norm.named_buffers():
        if name != "num_batches_tracked":
            assert torch.equal(state[f"norm.{name}"], tensor)
            assert not torch.equal(tensor, torch.full((4,), float(name == "running_var")))
    assert program.evaluated() is not program
    assert not torch.equal(program.eval()(torch.ones(3, 4)), evaluated), "its statistics have moved"
    assert torch.equal(program(torch.ones(3, 4)), program(torch.ones(3, 4)))


def test_what_stays_in_evaluation_mode_is_said() -> None:
    program = capture(Inside("branch"), torch.randn(6, 4))
    assert sorted(note.text for note in program.notes) == [
        "BatchNorm1d keeps its statistics when the program is trained: norm",
        "Dropout stays off when the program is trained: drop (0.5)",
    ]
    before = {name: tensor.clone() for name, tensor in program.state_dict().items()}
    x = torch.ones(8, 4)
    assert torch.equal(program.train()(x), program(x))
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.state_dict().items())


def test_statistics_over_all_batches_stay_and_that_is_said() -> None:
    (note,) = capture(Inside("average"), torch.randn(6, 4)).notes
    assert note.text == "BatchNorm1d keeps its statistics when the program is trained: norm"
