"""What holds for every test."""

from __future__ import annotations

import functools
import gc
import logging
import os

import pytest
from hypothesis import settings

# Graphs of torch, sympy and ONNX are many small objects that live on; looking through them for garbage after every 700
# new ones, Python's default, took a seventh of the suite's time.
gc.set_threshold(20_000, 20, 100)

settings.register_profile("untimed", deadline=None)  # how long an example takes is the machine's affair
settings.load_profile("untimed")

os.environ["GRAPHOPT_CACHE"] = ""  # what a test decides is no other's, and not the user's


@pytest.fixture(scope="session")
def growth_as_shipped() -> float:
    """What `memory` is for users."""
    from graphopt.ir import memory

    return memory._GROWTH


@pytest.fixture(autouse=True, scope="session")
def _in_less_time(growth_as_shipped: float) -> None:
    """Time artifacts for a moment, look for dead circles at twice as many objects, and describe no trace to pytest."""
    from graphopt.ir import memory
    from graphopt.job import deliver

    deliver.compare = functools.partial(deliver.compare, seconds=0.05)  # type: ignore[assignment]
    memory._GROWTH = 2.0
    # pytest listens to loggers that do not propagate, and torch then writes every step of a trace out for it
    trace = logging.getLogger("torch.__trace")
    trace.propagate = True
    trace.handlers.clear()


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-xdist hand files out as they come: it would begin with those of most tests, the longest have few."""
    config.option.loadscopereorder = False
