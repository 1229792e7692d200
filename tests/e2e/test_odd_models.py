"""The whole job on odd models: captured, optimised, lowered, reloaded from disk and compared at several batch sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graphopt
from graphopt.backends.onnx_execution.agreement import half_of_the_digits, relative_error
from graphopt.backends.onnx_execution.replay import quantize_nodes
from graphopt.errors import LoweringError
from graphopt.ir.program import Program
from graphopt.job.job import Job
from graphopt.pipeline.registry import backend
from tests.e2e.odd_cases import ODD, Case, case

PASSES = "prune:ratio=0.5:round_to=4,svd:ratio=0.5:round_to=4,int8"
REFUSED = {
    "bfloat16": "`x` is bfloat16, which numpy arrays cannot hold",
    "bfloat16 inside": r"ONNX Runtime has no bfloat16 kernels .* Convert it with `model.float\(\)`",
}
# TensorRT's own parser and builder run on these; the others cost time and differ little there.
TENSORRT = ("transposed convolutions", "branches")
# Integers of two correct runtimes may differ by one step in every layer; each step is 1/255 of a value's range.
_FLIPPED = 0.1

Arrays = Mapping[str, Tensor]


@pytest.mark.parametrize("name", [name for name in ODD if name not in REFUSED])
def test_optimised_lowered_and_reloaded(name: str, tmp_path: Path) -> None:
    _, result = _job(name, PASSES, "onnxruntime")
    said = [plan.pass_name for plan in result.plans if plan.sites or plan.refusals]
    assert {"prune", "svd", "int8"} <= set(said)  # silence is a bug
    program = result.programs["onnxruntime"]
    _check_artifact(name, program, backend("onnxruntime").lower(program, tmp_path / "model.onnx"))


@pytest.mark.parametrize("name", TENSORRT)
def test_for_tensorrt(name: str, tmp_path: Path) -> None:
    _, result = _job(name, PASSES, "tensorrt")
    artifact = backend("tensorrt").lower(result.programs["tensorrt"], tmp_path / "model.onnx")
    assert str(artifact.facts["engine"]).startswith(("built", "tensorrt-rtx is not installed"))
    _check_artifact(name, result.programs["tensorrt"], artifact)


@pytest.mark.parametrize("name", ["several inputs, nested outputs", "raw images"])
def test_lowered_as_it_is(name: str, tmp_path: Path) -> None:
    made, original = case(name), _original(name)
    session = _session(backend("onnxruntime").lower(original, tmp_path / "model.onnx"))
    for size in (1, 3, 8):
        batch = _first(made, original, size)
        _check(_eager(made.model, batch), session(batch))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_a_sentence(name: str) -> None:
    with pytest.raises(LoweringError, match=REFUSED[name]):
        _job(name, PASSES, "onnxruntime", lower=True)


def test_another_length(tmp_path: Path) -> None:
    made, result = _job("any length", "prune:ratio=0.5:round_to=4", "onnxruntime")
    program = result.programs["onnxruntime"]
    batch = {"ids": torch.randint(0, 50, (3, 17))}
    wanted = program.call_flat(tuple(batch.values()))
    _check(wanted, _session(backend("onnxruntime").lower(program, tmp_path / "model.onnx"))(batch))
    assert wanted[0].shape == _eager(made.model, batch)[0].shape


@functools.cache
def _original(name: str) -> Program:
    made = case(name)
    return Job.open(made.model, made.data, dynamic_shapes=made.dynamic_shapes).original


def _job(name: str, passes: str, target: str, *, lower: bool = False) -> tuple[Case, graphopt.Result]:
    """Optimise a case; without lowering, which `optimize` does with the baseline too and which costs as much again."""
    made = case(name)
    return made, graphopt.optimize(_original(name), made.data, passes, target, bench=False, lower=lower)


def _check_artifact(name: str, program: Program, artifact: graphopt.Artifact) -> None:
    """Compare the file on disk with its program: integer by integer on data neither has seen, then end to end."""
    item, fresh = artifact.backend, case(name, seed=1)
    item.verify(item.open(artifact.path), program, tuple(value.numpy() for value in fresh.data.values()))
    allowed = _FLIPPED if quantize_nodes(program) else None
    session = _session(artifact)
    for size in (1, 3, 8):
        batch = _first(fresh, program, size)
        with torch.no_grad():
            wanted = program.call_flat([value.clone() for value in batch.values()])
        _check(wanted, session(batch), allowed)


def _first(made: Case, program: Program, size: int) -> Arrays:
    """Return a batch of `size` samples, or the only one a static program takes."""
    return {name: value[:size] for name, value in made.data.items()} if program.batch_size is None else made.data


def _session(artifact: graphopt.Artifact) -> Callable[[Arrays], list[Tensor]]:
    """Open the file again, as a deployment does."""
    session = artifact.backend.open(artifact.path).session(threads=1)
    return lambda batch: [torch.from_numpy(array) for array in session(*(value.numpy() for value in batch.values()))]


def _eager(model: nn.Module, batch: Arrays) -> list[Tensor]:
    with torch.no_grad():
        outputs: Any = model(**{name: value.clone() for name, value in batch.items()})
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _check(wanted: Sequence[Tensor], found: Sequence[Tensor], allowed: float | None = None) -> None:
    """Compare outputs: shapes, dtypes, numbers to float tolerance or `allowed`; without that, all else exactly."""
    assert [(want.shape, want.dtype) for want in wanted] == [(got.shape, got.dtype) for got in found]
    for want, got in zip(wanted, found, strict=True):
        if want.is_floating_point():
            assert relative_error(want, got) <= (half_of_the_digits(want.dtype) if allowed is None else allowed)
        elif allowed is None:
            assert torch.equal(want, got)
