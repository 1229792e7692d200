"""What is known to be wrong in ONNX Runtime is found, and what the lowering avoids is right."""

from __future__ import annotations

import pytest

from graphopt.backends.onnxruntime import breakers
from tools.fuzz_runtime import Found, examine
from tools.fuzz_runtime_cases import pair


def test_a_wrong_fusion_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = pair(["softmax"], seed=15)
    assert case is not None
    found = Found()
    examine([case], found)
    assert found.counts == {"right": 1}
    monkeypatch.setattr(breakers, "BREAKERS", {})
    examine([case], found)
    assert found.counts == {"right": 1, "wrong": 1}
    name, said, kernels = found.wrong[0]
    assert name == "Q softmax Q, 5-D, close together"
    assert "for the result of `softmax`" in said
    assert "QLinearSoftmax" in kernels
