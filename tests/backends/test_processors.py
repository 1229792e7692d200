"""ONNX Runtime on processors without VNNI: a target of its own."""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from graphopt.backends.onnx_execution.session import SessionSettings
from graphopt.backends.onnxruntime import OnnxRuntimeArmBackend, OnnxRuntimeAvx2Backend, OnnxRuntimeBackend
from graphopt.backends.onnxruntime import backend as module
from graphopt.backends.onnxruntime.description import DESCRIPTION, DESCRIPTION_AVX2
from graphopt.backends.onnxruntime.options import recorded_options
from graphopt.passes.int8 import Int8Options
from graphopt.pipeline.registry import backends_named
from graphopt.targets.backend import Artifact
from graphopt.targets.costs import Work
from tests.passes.int8_models import TwoConvs, images, quantized

UNGUARDED = Int8Options(guard="none")  # networks so small are faster as float
X86, ARM = ("x86_64", "fpu avx2 avx512f"), ("aarch64", "asimd i8mm")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    made = {}
    for backend in (OnnxRuntimeBackend(), OnnxRuntimeArmBackend(), OnnxRuntimeAvx2Backend()):
        program, _ = quantized(TwoConvs(), images(), target=backend.description, options=UNGUARDED)
        artifact = backend.lower(program, backend.path_in(tmp_path_factory.mktemp(backend.name)))
        backend.verify(artifact, program)
        made[backend.name] = artifact
    return made


def test_files_and_names(artifacts: dict[str, Artifact]) -> None:
    named = "onnxruntime:x86-avx2,onnxruntime:arm,onnxruntime"
    assert [item.name for item in backends_named(named)] == [*reversed(artifacts)]
    assert Path(artifacts["onnxruntime-x86-avx2"].path).name == "onnxruntime-x86-avx2.onnx"


def test_seven_bits_need_no_precise_session(artifacts: dict[str, Artifact]) -> None:
    assert "where_products_saturate" in artifacts["onnxruntime"].session_options
    assert "where_products_saturate" not in artifacts["onnxruntime-x86-avx2"].session_options
    program, _ = quantized(TwoConvs(), images(), target=DESCRIPTION_AVX2, options=UNGUARDED)
    stored = [tensor for tensor in program.state_dict().values() if tensor.dtype is torch.int8]
    assert max(int(tensor.abs().max()) for tensor in stored) == 63


def test_what_is_rounded_by_scales_of_its_own_is_not_rounded_otherwise_on_arm() -> None:
    text = """<ir_version: 10, opset_import: ["": 20]> g (float[n,4] x, int8[4,3] w) => (int32[n,3] y) {
        q, s, z = DynamicQuantizeLinear(x)
        y = MatMulInteger(q, w, z)
    }"""
    settings = SessionSettings.of(recorded_options(ir.from_onnx_text(text)))
    assert settings.config == {"mlas.disable_kleidiai": "1"}


@pytest.mark.parametrize(
    ("target", "machine", "saturates", "said"),
    [
        ("onnxruntime", X86, True, "no VNNI"),
        ("onnxruntime", X86, False, None),
        ("onnxruntime-x86-avx2", X86, False, "has VNNI"),
        ("onnxruntime-x86-avx2", X86, True, None),
        ("onnxruntime", ARM, False, "costs of AMD EPYC, x86_64 with VNNI, and this is aarch64"),
        ("onnxruntime-x86-avx2", ARM, False, "costs of AMD EPYC, x86_64 without VNNI, and this is aarch64"),
        ("onnxruntime-arm", X86, False, "this machine is no ARM"),
    ],
)
def test_says_what_suits_the_machine(
    artifacts: dict[str, Artifact],
    target: str,
    machine: tuple[str, str],
    saturates: bool,
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind, flags = machine
    monkeypatch.setattr(platform, "machine", lambda: kind)
    monkeypatch.setattr(module, "said_of_processor", lambda *names: [flags])
    monkeypatch.setattr(module, "products_saturate", lambda: saturates)
    artifact = artifacts[target]
    advice = artifact.backend.advice(artifact)
    assert (said in advice[0]) if said else advice == []


def test_costs_are_shipped_where_they_were_measured() -> None:
    for description in (DESCRIPTION, DESCRIPTION_AVX2):
        assert description.costs is not None
        assert description.costs.target == description.name
        large = Work(operations=2 * 56 * 56 * 64 * 576, elements=2 * 56 * 56 * 64)  # a layer of ResNet-18
        integer, floating = (description.costs.seconds("conv2d", form, large) or 0.0 for form in ("static", "float"))
        assert 1e-4 < integer < floating < 1e-2


def test_on_arm_nothing_is_float_for_costs_of_other_processors(artifacts: dict[str, Artifact]) -> None:
    target = OnnxRuntimeArmBackend().description
    assert target.costs is None
    _, plan = quantized(TwoConvs(), images(), target=target)
    assert {record["site"] for record in plan.layers} == {"conv2d", "conv2d_1"}
    assert artifacts[target.name].facts["integer"] == artifacts[target.name].facts["quantized"] > 0


def test_of_costs_that_decided_nothing_nothing_is_said(
    artifacts: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    artifact = artifacts["onnxruntime"]
    floating = dataclasses.replace(artifact, facts={**artifact.facts, "quantized": 0})
    assert artifact.backend.advice(floating) == []
