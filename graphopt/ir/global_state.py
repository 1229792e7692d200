"""What holds for a whole process: its random generators, the mode in which its tensors are made, and who may trace."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from graphopt.ir.memory import take_back, what_is_there_set_aside


@dataclass(frozen=True)
class RandomState:
    """Where the generators of torch (of the CPU and of every accelerator), NumPy and Python stand."""

    cpu: torch.Tensor
    devices: list[torch.Tensor]
    arrays: Any
    python: Any

    @classmethod
    def now(cls) -> RandomState:
        """Take note of the state."""
        generators = _of_accelerators()
        devices = generators.get_rng_state_all() if generators else []
        return cls(torch.get_rng_state(), devices, np.random.get_state(), random.getstate())

    def restore(self) -> None:
        """Put the generators back."""
        torch.set_rng_state(self.cpu)
        if generators := _of_accelerators():
            generators.set_rng_state_all(self.devices)
        np.random.set_state(self.arrays)
        random.setstate(self.python)


def _of_accelerators() -> Any:
    """Return torch's module of the accelerators that are here, None where there are none or they draw nothing."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    module = None if accelerator is None else torch.get_device_module(accelerator)
    return module if hasattr(module, "get_rng_state_all") else None


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Give the generators of torch, NumPy and Python back their state: models, data and evaluations draw from them."""
    state = RandomState.now()
    try:
        yield
    finally:
        state.restore()


def seeded(seed: int) -> RandomState:
    """Return the state of generators that start from a seed; those of the process are left alone."""
    with random_state_kept():
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        return RandomState.now()


def outside_inference(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor, or a copy where it was made in inference mode, which is neither exported nor trained outside."""
    return tensor.clone() if tensor.is_inference() else tensor


_working = threading.RLock()


@contextlib.contextmanager
def one_thread_at_a_time() -> Iterator[None]:
    """Keep other threads from graphopt's work meanwhile; what one's own thread calls from within goes on.

    Tracing is a state of the whole process, as are torch's settings and what graphopt patches in it, which is undone in
    the order of a stack: of models traced at once one gets what is meant for the other (torch 2.13). Python does not
    look for dead circles in what was there before.
    """
    with _working, what_is_there_set_aside():
        yield


def _work_anew() -> None:
    """Let a forked process work and look at everything: the thread that worked may not be in it."""
    global _working
    _working = threading.RLock()
    take_back()


os.register_at_fork(after_in_child=_work_anew)
