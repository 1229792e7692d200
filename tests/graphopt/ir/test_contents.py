"""Tensors that are conjugate or negative views: their memory holds other numbers than they do."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import graphopt
from graphopt.capturing.capture import capture
from graphopt.data import Samples
from graphopt.ir.contents import content
from graphopt.ir.editor import Editor
from graphopt.pipeline.plan import Plan

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
Z = torch.randn(6, 6, dtype=torch.cfloat, generator=torch.Generator().manual_seed(1))
VIEWS = {
    "conjugate": Z.conj(),
    "negative": torch._neg_view(Z.real.contiguous()),
    "imaginary part of a conjugate": Z.conj().imag,
    "negative conjugate": torch._neg_view(Z).conj(),
}


@pytest.fixture(params=sorted(VIEWS))
def view(request: pytest.FixtureRequest) -> Tensor:
    found = VIEWS[request.param]
    assert is_view(found)
    return found


def is_view(tensor: Tensor) -> bool:
    return tensor.is_conj() or tensor.is_neg()


class Net(nn.Module):
    """Multiplies by a tensor that it holds."""

    def __init__(self, view: Tensor, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 4)
        if how == "buffer":
            self.register_buffer("held", view)
        else:
            self.held = nn.Parameter(view) if how == "parameter" else view

    def forward(self, input: Tensor) -> Tensor:
        by = self.held.real + self.held.imag if self.held.is_complex() else self.held
        return self.last((self.first(input) @ by).relu())


def test_content_is_that_of_the_values(view: Tensor) -> None:
    assert content(view) == content(view.resolve_conj().resolve_neg().clone())


@pytest.mark.parametrize("how", ["buffer", "parameter", "attribute"])
def test_programs_hold_values(view: Tensor, how: str, tmp_path: Path) -> None:
    model = Net(view, how).eval()
    assert is_view(model.held)
    program = capture(model, X[:2], share_tensors=True)
    assert not any(map(is_view, program.state_dict().values()))
    program.save(tmp_path / "program.pt2")
    for one in (program, graphopt.load(tmp_path / "program.pt2")):
        assert torch.allclose(one(X), model(X), atol=1e-6)
    assert is_view(model.held)


def test_models_are_optimised_and_lowered() -> None:
    """Runtimes read memory."""
    model = Net(VIEWS["negative"], "parameter").eval()
    for _ in range(2):  # decided, and found
        result = graphopt.optimize(model, X, passes="fold,svd:energy=0.99", bench=False)
        (output,) = result.artifacts["onnxruntime"].session()(X.numpy())
        assert np.abs(output - result.program(X).detach().numpy()).max() < 1e-5


def test_passes_store_values(view: Tensor, tmp_path: Path) -> None:
    plan = Plan(pass_name="any", tensors={"one": view, "same": view}).on(torch.device("cpu"))
    save_file(dict(plan.tensors), tmp_path / "tensors")
    assert all(torch.equal(tensor, view) for tensor in load_file(tmp_path / "tensors").values())
    editor = Editor(capture(nn.Linear(6, 6), X[:2]).copy().graph_module, "any")
    name = editor.put("other", view)
    assert not is_view(editor.gm.get_buffer(name))
    assert torch.equal(editor.gm.get_buffer(name), view)


def test_data_are_values() -> None:
    inputs, labels = torch._neg_view(X), torch._neg_view(torch.arange(32) % 4 - 3)
    for batch, known in itertools.islice(Samples.open((inputs, labels), ["input"]).labelled_batches(4), 2):
        assert known is not None
        assert not any(map(is_view, (*batch, known)))
    program = capture(nn.Linear(6, 6), inputs[:2])
    assert not any(map(is_view, program.flat_examples()))
    result = graphopt.optimize(nn.Linear(6, 4), inputs, eval=lambda model: model(inputs).sum().detach(), bench=False)
    assert result.report.rows[0].metric == pytest.approx(float(result.original(inputs).sum().detach()), rel=1e-5)
