"""Random generators are put back whatever happens, and tensors made in inference mode can be trained outside it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from graphopt.ir.global_state import outside_inference, random_state_kept, seeded


def drawn() -> list[float]:
    """Draw from each generator."""
    devices = [torch.rand((), device=f"cuda:{index}").item() for index in range(torch.cuda.device_count())]
    return [float(torch.rand(())), float(np.random.rand()), random.random(), *devices]


@pytest.fixture(autouse=True)
def _kept() -> Iterator[None]:
    with random_state_kept():
        yield


def test_generators_are_put_back_after_a_failure_too() -> None:
    start = seeded(3)
    start.restore()
    wanted = drawn()
    start.restore()
    with contextlib.suppress(KeyError), random_state_kept():
        drawn()
        raise KeyError
    assert drawn() == wanted


def test_a_seed_says_what_every_generator_draws() -> None:
    before = drawn()
    seeded(1).restore()
    first = drawn()
    assert all(one != other for one, other in zip(first, before, strict=True))
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    assert drawn() == first


def test_what_inference_made_is_trained_outside_it() -> None:
    with torch.inference_mode():
        made = torch.ones(2)
    assert outside_inference(made).requires_grad_().requires_grad
    plain = torch.ones(2)
    assert outside_inference(plain) is plain
