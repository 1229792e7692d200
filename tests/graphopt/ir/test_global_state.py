"""Random generators are put back whatever happens, and tensors made in inference mode can be trained outside it."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import random
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from graphopt.ir.global_state import one_thread_at_a_time, outside_inference, random_state_kept, seeded


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


def test_generators_of_any_accelerator_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    there = [torch.tensor([1]), torch.tensor([2])]
    put_back: list[list[torch.Tensor]] = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("xpu"))
    monkeypatch.setattr(torch.xpu, "get_rng_state_all", lambda: there)
    monkeypatch.setattr(torch.xpu, "set_rng_state_all", put_back.append)
    with random_state_kept():
        pass
    assert put_back == [there]


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


def _work() -> None:
    assert gc.get_freeze_count() == 0
    with one_thread_at_a_time():
        pass


def test_a_process_forked_while_a_thread_works_can_work_and_looks_at_all() -> None:
    """Whether its thread is the one that works or another."""
    forked = [multiprocessing.get_context("fork").Process(target=_work, daemon=True) for _ in range(2)]
    working, started = threading.Event(), threading.Event()

    def work() -> None:
        with one_thread_at_a_time():
            forked[0].start()
            working.set()
            started.wait(20)

    other = threading.Thread(target=work)
    other.start()
    working.wait(20)
    forked[1].start()
    started.set()
    other.join(20)
    for process in forked:
        process.join(20)
        process.kill()
    assert [process.exitcode for process in forked] == [0, 0]


def test_work_sets_aside_what_is_there() -> None:
    with one_thread_at_a_time():
        assert gc.get_freeze_count()
    assert gc.get_freeze_count() == 0
