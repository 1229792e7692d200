"""Several threads at once: each gets what one alone gets, to the byte."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.pipeline.pipeline import Pipeline

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
PRUNE = "prune:ratio=0.5:round_to=1"


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


def optimized(models: list[nn.Module]) -> graphopt.Result:
    return graphopt.optimize(models.pop(), X, PRUNE, eval=traced_again, bench=False, cache=False)


def by_way_of_a_job(models: list[nn.Module]) -> graphopt.Result:
    job = graphopt.Job.open(models.pop(), X, eval=traced_again, name="Sequential", cache=False)
    return job.deliver(job.run(Pipeline.parse(PRUNE)), bench=False)


def traced_again(judged: Callable[..., Any]) -> float:
    """Judge by a model that is captured while graphopt works, as a user's metric may."""
    return float(graphopt.capture(nn.Linear(8, 4), X[:2])(X).isfinite().all() and judged(X).isfinite().all())


def test_threads_give_the_results_and_bytes_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [model() for _ in range(4)]
    optimized(models).save(tmp_path / "alone")
    wanted = contents(tmp_path / "alone")
    assert b"The batch size is fixed" not in wanted["program.pt2"]
    failed: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)

    def work(index: int) -> None:
        result = (optimized, by_way_of_a_job)[index % 2](models)
        result.save(tmp_path / f"{index}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    for folder in sorted(set(tmp_path.iterdir()) - {tmp_path / "alone"}):
        assert contents(folder) == wanted, folder.name


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files that hold no times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "report.json"}
