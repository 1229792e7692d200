"""A program is a value in evaluation mode whoever made it, and what the caller gave is left as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.backends.onnxruntime import OnnxRuntimeBackend
from graphopt.ir.program import Program
from graphopt.ir.training import is_training
from graphopt.job.replaying import replay
from graphopt.measure.equivalence import measure

DATA = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 + 1


def net() -> nn.Sequential:
    """Return a model whose outputs in training mode are far from those in evaluation."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(288, 5)
    )
    model(DATA)  # the statistics are no longer those of initialisation
    return model


@pytest.fixture(scope="module")
def captured() -> Program:
    """Hand out copies of what `net` is captured as."""
    return graphopt.capture(net(), DATA[:4])


@pytest.fixture(scope="module")
def wanted() -> Tensor:
    out: Tensor = net().eval()(DATA).detach()
    return out


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def values(owner: nn.Module | Program) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in owner.state_dict().items()}


def assert_same(owner: nn.Module | Program, before: dict[str, Tensor]) -> None:
    for name, tensor in owner.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_a_module_is_optimised_in_evaluation_mode_and_left_as_it_was(mode: str, wanted: Tensor) -> None:
    model = net().train(mode != "eval")
    if mode == "mixed":
        model[1].eval()
    was, before = modes(model), values(model)
    result = graphopt.optimize(model, DATA, "fold", bench=False, lower=False)
    torch.testing.assert_close(result.program(DATA), wanted)
    assert modes(model) == was
    assert_same(model, before)


@pytest.mark.parametrize("passes", ["", "prune:ratio=0.25:round_to=1,recover:epochs=1", "fold,int8"])
def test_a_program_in_training_mode_is_optimised_in_evaluation_mode(
    passes: str, captured: Program, wanted: Tensor
) -> None:
    program = captured.copy(share_tensors=False).train()
    before = values(program)
    result = graphopt.optimize(
        program, DATA, passes, bench=False, eval=lambda model: -float(model(DATA).detach().var())
    )
    assert is_training(program.graph_module)
    assert not is_training(result.original.graph_module)
    assert not is_training(result.program.graph_module)
    torch.testing.assert_close(result.original(DATA), wanted)
    torch.testing.assert_close(torch.from_numpy(result.artifact.session()(DATA.numpy())[0]), result.program(DATA),
                               rtol=0.1, atol=0.05)  # int8 rounds otherwise  # fmt: skip
    assert_same(program, before)


def test_what_is_saved_in_training_mode_loads_in_evaluation_mode(
    tmp_path: Path, captured: Program, wanted: Tensor
) -> None:
    program = captured.copy(share_tensors=False).train()
    path = program.save(tmp_path / "own.pt2")
    assert is_training(program.graph_module)
    loaded = graphopt.load(path)
    torch.testing.assert_close(loaded(DATA), wanted)
    torch.testing.assert_close(torch.export.load(path).module()(DATA), wanted)
    assert is_training(loaded.train().graph_module)  # it is as trainable as before


def test_a_file_that_was_written_in_training_mode_loads_in_evaluation_mode(
    tmp_path: Path, captured: Program, wanted: Tensor
) -> None:
    program = captured.copy(share_tensors=False)
    fresh = graphopt.load(program.save(tmp_path / "own.pt2"))
    exported = program.train().export()
    torch.export.save(exported, tmp_path / "train.pt2")
    loaded = graphopt.load(tmp_path / "train.pt2")
    torch.testing.assert_close(loaded(DATA), wanted)
    assert [spec.shape for spec in loaded.inputs] == [spec.shape for spec in fresh.inputs]


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_strangers_export_in_training_mode_loads_in_evaluation_mode(
    tmp_path: Path, wanted: Tensor, dynamic: bool
) -> None:
    shapes = ({0: torch.export.Dim.DYNAMIC},) if dynamic else None
    exported = torch.export.export(net().train(), (DATA,), dynamic_shapes=shapes)
    torch.export.save(exported, tmp_path / "other.pt2")
    program = graphopt.load(tmp_path / "other.pt2")
    before = values(program)
    torch.testing.assert_close(program(DATA), wanted)
    assert_same(program, before)
    (note,) = [note.text for note in program.notes if note.subject == "training"]
    assert note == "The model was exported in training mode; in evaluation mode are now: batch_norm, dropout"


def test_a_module_exported_in_training_mode_is_optimised_in_evaluation_mode(wanted: Tensor) -> None:
    exported = torch.export.export(net().train(), (DATA,)).module()
    before = values(exported)
    result = graphopt.optimize(exported, DATA, "", bench=False)
    torch.testing.assert_close(result.program(DATA), wanted)
    assert any("exported in training mode" in note for note in result.report.notes)
    assert_same(exported, before)


def test_batch_statistics_without_running_ones_stay(tmp_path: Path) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    torch.export.save(torch.export.export(model, (DATA,), dynamic_shapes=shapes), tmp_path / "other.pt2")
    torch.testing.assert_close(graphopt.load(tmp_path / "other.pt2")(DATA), model(DATA))


def test_replay_lowering_and_comparison_take_a_program_in_training_mode(
    tmp_path: Path, captured: Program, wanted: Tensor
) -> None:
    program = captured.copy(share_tensors=False)
    graphopt.optimize(program, DATA, "fold", bench=False, lower=False).save(tmp_path / "out")
    before = values(program.train())
    replayed = replay(program, tmp_path / "out" / "manifest.json")["onnxruntime"]
    torch.testing.assert_close(replayed(DATA), wanted)
    artifact = OnnxRuntimeBackend().lower(program, tmp_path / "own.onnx")
    OnnxRuntimeBackend().verify(artifact, program, (DATA.numpy(),))
    torch.testing.assert_close(torch.from_numpy(artifact.session()(DATA.numpy())[0]), wanted, rtol=1e-4, atol=1e-5)
    assert measure(program, lambda batch: (wanted,), (DATA,)).relative < 1e-5
    assert is_training(program.graph_module)
    assert_same(program, before)


def process_state() -> list[Any]:
    backends = torch.backends
    return [
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.is_inference_mode_enabled(),
        (backends.mkldnn.enabled, backends.mha.get_fastpath_enabled()),
        (backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic),
        (
            backends.cuda.flash_sdp_enabled(),
            backends.cuda.math_sdp_enabled(),
            backends.cuda.mem_efficient_sdp_enabled(),
        ),
    ]


def draws() -> list[float]:
    return [float(torch.rand(())), random.random(), float(np.random.rand())]


def shuffled() -> Any:
    dataset = torch.utils.data.TensorDataset(DATA)
    return torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True)  # draws a seed for every pass over it


def scored(model: Callable[..., Any]) -> float:
    torch.manual_seed(7), random.seed(7), np.random.seed(7)  # fmt: skip
    return -float(model(DATA).detach().var())


@pytest.mark.parametrize(
    "passes",
    ["prune:ratio=0.25:round_to=1:criterion=taylor,recover:epochs=1:augment=flip", "svd:ratio=0.3,fold,int8"],
)
def test_the_state_of_the_process_is_left_as_it_was(passes: str) -> None:
    model = net()

    def seeded() -> None:
        torch.manual_seed(3), random.seed(3), np.random.seed(3)  # fmt: skip

    seeded()
    expected, before = draws(), process_state()
    seeded()
    graphopt.optimize(model, shuffled(), passes, eval=scored, bench=False)
    assert draws() == expected
    assert process_state() == before


def test_an_evaluation_function_sees_the_model_in_evaluation_mode_and_may_not_leave_it_in_training(
    captured: Program,
) -> None:
    seen = []

    def score(model: Any) -> float:
        if isinstance(model, Program):
            seen.append(is_training(model.graph_module))
            model.train()
        return 1.0

    result = graphopt.optimize(captured.copy(), DATA, "fold", eval=score, bench=False, lower=False)
    assert seen == [False, False]
    assert not any(is_training(one.graph_module) for one in (result.original, result.program))
