"""The comparison of two devices fails where they decide unlike."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.registry import PassRegistry
from tools import check_device, result_digests

CPU = torch.device("cpu")


def result(*sites: int, error: float = 0.0, device: torch.device = CPU) -> Any:
    plans = [
        SimpleNamespace(pass_name="svd", sites=["site"] * count, to_json=lambda count=count: {"sites": count})
        for count in sites
    ]
    measured = [SimpleNamespace(relative=value) for value in (0.5, error)]  # of a pass for the target, of its file
    rows = [SimpleNamespace(target="onnxruntime", size=size, error=measured[size]) for size in (0, 1)]
    rows[0].size = None
    return SimpleNamespace(
        plans=plans, programs={"": SimpleNamespace(device=device)}, report=SimpleNamespace(rows=rows)
    )


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (result(3, 2), ""),
        (result(3, 1), "sites on the CPU: svd 3, svd 2; on the device: svd 3, svd 1"),
        (result(3), "sites on the CPU: svd 3, svd 2; on the device: svd 3"),
        (result(3, 2, device=torch.device("meta")), "the program came back on meta"),
        (result(3, 2, error=0.2), "the artifact is further off"),
    ],
)
def test_what_is_wrong(there: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = iter([result(3, 2), there])
    monkeypatch.setattr(check_device, "_run", lambda *_: (next(made), 0.0))
    monkeypatch.setattr(check_device, "cases", lambda: [("a", torch.nn.Linear(2, 2), torch.ones(4, 2), "svd", None)])
    (found,) = check_device.compare(CPU, "a")
    assert found.wrong == said


def test_every_pass_is_compared() -> None:
    registry = PassRegistry()
    pipelines = [
        *(passes for *_, passes, _ in result_digests.cases()),
        *(passes for _, passes in check_device._further()),
    ]
    named = {step.instance.name for text in pipelines for step in Pipeline.parse(text, registry).steps}
    assert named == set(registry.names())
