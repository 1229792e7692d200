"""Taps as outputs: the form of the outputs, and that insert and strip are exact inverses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphopt.capturing.capture import capture
from graphopt.capturing.load import load
from graphopt.distillation.addresses import Tap, resolve
from graphopt.distillation.taps import insert_taps, own_outputs, strip_taps, taps_of
from graphopt.errors import PassError
from graphopt.ir.invariants import check_invariants
from graphopt.ir.program import Program
from graphopt.pipeline.registry import backend
from graphopt.testing import fingerprint
from tests.graphopt.distillation.models import ResidualNet


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return capture(ResidualNet(), torch.randn(2, 3, 8, 8))


def tapped(program: Program, *wanted: str) -> Program:
    return insert_taps(program, resolve(program, wanted)[0])


def test_own_outputs_stay_first_and_taps_follow_by_address(program: Program) -> None:
    result = tapped(program, "layer1", "layer1.conv2:conv2d")
    assert [str(spec) for spec in result.outputs] == [
        "output: batchx5 float32",
        "tap_layer1_conv2_conv2d: batchx8x8x8 float32",
        "tap_layer1_relu_relu_1: batchx8x8x8 float32",
    ]
    x = torch.randn(3, 3, 8, 8)
    own, taps = result(x)
    assert torch.equal(own, program(x))
    assert list(taps) == ["layer1.conv2:conv2d", "layer1.relu:relu#1"]
    flat = result.call_flat((x,))
    assert all(torch.equal(one, other) for one, other in zip(flat, (own, *taps.values()), strict=True))
    assert [tap.node for tap in taps_of(result)] == ["conv2d_2", "relu_2"]
    assert own_outputs(result) == program.outputs
    check_invariants(program, result, "taps", changes_outputs=True)


def test_the_value_is_what_the_module_computes() -> None:
    torch.manual_seed(1)
    model = ResidualNet().eval()
    x = torch.randn(4, 3, 8, 8)
    seen: list[Tensor] = []
    model.layer1.bn2.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    _, taps = tapped(capture(model, x), "layer1.bn2")(x)
    seen.clear()
    model(x)
    torch.testing.assert_close(taps["layer1.bn2:batch_norm"], seen[0])


def test_strip_gives_back_the_very_program(program: Program) -> None:
    result = strip_taps(tapped(program, "*:conv2d", "layer?"))
    assert fingerprint(result) == fingerprint(program)
    assert result.graph_module.code == program.graph_module.code
    assert result.outputs == program.outputs
    assert [node.meta for node in result.graph.nodes] == [node.meta for node in program.graph.nodes]
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(result(x), program(x))


def test_inserting_does_not_change_the_program_it_is_given(program: Program) -> None:
    before = fingerprint(program)
    result = tapped(program, "layer1")
    assert fingerprint(program) == before
    assert result.graph_module is not program.graph_module
    assert taps_of(program) == []


def test_taps_add_up_and_are_stripped_one_by_one(program: Program) -> None:
    one = tapped(program, "layer1")
    two = tapped(one, "layer2", "layer1")
    assert [tap.address for tap in taps_of(two)] == ["layer1.relu:relu#1", "layer2.relu:relu#1"]
    assert fingerprint(strip_taps(two, ["layer2.relu:relu#1"])) == fingerprint(one)
    assert strip_taps(two, ["elsewhere"]) is two
    assert tapped(one, "layer1") is one
    assert strip_taps(program) is program


def test_lowered_bytes_are_the_same_after_insert_and_strip(program: Program, tmp_path: Path) -> None:
    runtime = backend("onnxruntime")
    plain = runtime.lower(program, tmp_path / "plain.onnx")
    stripped = runtime.lower(strip_taps(tapped(program, "layer1", "head")), tmp_path / "stripped.onnx")
    assert stripped.path.read_bytes() == plain.path.read_bytes()


def test_lowering_names_the_taps_and_computes_them(program: Program, tmp_path: Path) -> None:
    result = tapped(program, "layer1", "head")  # the head's value is an output already
    artifact = backend("onnxruntime").lower(result, tmp_path / "tapped.onnx")
    assert [spec.name for spec in artifact.outputs] == ["output", "tap_layer1_relu_relu_1", "tap_head_linear"]
    x = torch.randn(3, 3, 8, 8)
    for got, want in zip(artifact.session()(x.numpy()), result.call_flat((x,)), strict=True):
        np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_a_saved_program_keeps_its_taps(program: Program, tmp_path: Path) -> None:
    result = tapped(program, "layer1")
    loaded = load(result.save(tmp_path / "tapped.pt2"))
    assert [tap.address for tap in taps_of(loaded)] == ["layer1.relu:relu#1"]
    assert fingerprint(strip_taps(loaded)) == fingerprint(load(program.save(tmp_path / "plain.pt2")))


class Structured(nn.Module):
    """Returns a dictionary with a tuple in it, and computes part of it without gradients, on dynamic sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        with torch.no_grad():
            scores = self.inner(x).softmax(-1)
        pairs = scores.reshape(x.shape[0] * 2, 2)
        return {"scores": scores, "rest": (self.outer(scores), pairs.sum(0))}


def test_structure_no_grad_regions_and_dynamic_sizes() -> None:
    program = capture(Structured(), torch.randn(3, 4))
    result = tapped(program, "inner", "*:softmax", "*:reshape")
    x = torch.randn(5, 4)
    own, taps = result(x)
    assert own.keys() == {"scores", "rest"}
    assert isinstance(own["rest"], tuple)
    assert torch.equal(taps[":softmax"], own["scores"])
    assert {spec.name: spec.shape for spec in result.outputs}["tap_reshape"] == ("2*batch", 2)
    assert taps[":reshape"].shape == (10, 2)
    assert fingerprint(strip_taps(result)) == fingerprint(program)


class LooksTapped(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return x + 1, {"tap_a:b": x * 2}


def test_a_models_own_dictionary_is_not_taken_for_taps() -> None:
    program = capture(LooksTapped(), torch.randn(3, 4))
    assert taps_of(program) == []
    assert own_outputs(program) == program.outputs
    result = tapped(program, ":add")
    assert [tap.address for tap in taps_of(result)] == [":add"]
    assert fingerprint(strip_taps(result)) == fingerprint(program)


def test_a_tap_of_another_program(program: Program) -> None:
    with pytest.raises(PassError, match="no node `conv2d_77` for the tap `a:conv2d`"):
        insert_taps(program, [Tap("a:conv2d", "conv2d_77")])
