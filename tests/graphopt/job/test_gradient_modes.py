"""Gradients are followed and weights trained also where the caller has switched both off, or made the model so."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import nn

import graphopt
from graphopt.pipeline.pipeline import Pipeline

LEARNS = "prune:ratio=0.5:criterion=taylor:round_to=1,recover:epochs=8"


def made() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval(), torch.randn(96, 6)


@pytest.fixture(scope="module")
def expected() -> list[torch.Tensor]:
    result = graphopt.optimize(*made(), LEARNS, None)
    assert result.plans[-1].tensors, "it learns"
    return list(result.program.state_dict().values())


@pytest.mark.parametrize(
    ("mode", "inside"),
    [
        (torch.no_grad, contextlib.nullcontext),
        (torch.inference_mode, contextlib.nullcontext),
        (torch.inference_mode, torch.inference_mode),
    ],
)
def test_learning_where_gradients_are_off(
    mode: Callable[[], AbstractContextManager[None]],
    inside: Callable[[], AbstractContextManager[None]],
    expected: list[torch.Tensor],
) -> None:
    with inside():
        model, data = made()
    with mode():
        result = graphopt.optimize(model, data, LEARNS, None)
        assert torch.is_inference_mode_enabled() is (mode is torch.inference_mode)
        assert not torch.is_grad_enabled()
    for tensor, want in zip(result.program.state_dict().values(), expected, strict=True):
        assert torch.equal(tensor, want)
        assert not tensor.is_inference()


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model, data = made()
    program = graphopt.capture(model, (data[:2],))
    program.train()
    program(data.clone()).sum().backward()
    assert all(parameter.grad is not None for parameter in program.parameters())


def test_a_result_without_artifacts() -> None:
    model, data = made()
    with torch.inference_mode():
        job = graphopt.Job.open(model, data, target=None)
        result = job.undelivered(job.run(Pipeline.parse("")))
    assert not any(parameter.is_inference() for parameter in result.program.parameters())
