"""Costs of kernels from times of networks: what was put in comes out, and a network is counted as the guard counts."""

from __future__ import annotations

import itertools
import math
import platform
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from graphopt.backends.onnx_execution.session import SessionSettings
from graphopt.backends.onnxruntime import OnnxRuntimeBackend
from graphopt.backends.onnxruntime.description import DESCRIPTION_AVX2
from graphopt.backends.onnxruntime.fusion import kernel_counts
from graphopt.capturing.capture import capture
from graphopt.passes.quantization.paying import Charge
from graphopt.targets.costs import KernelCost, Work
from tools import measure_costs
from tools.measure_costs import Idle, Network, Row, _table, charges_of, fit
from tools.measure_costs_cases import Case, cases

KNOWN = {
    ("conv2d", "float", 8): KernelCost("conv2d", "float", 8, 2e-6, 1e-11, 1e-10),
    ("conv2d", "static", 8): KernelCost("conv2d", "static", 8, 5e-6, 5e-12, 0.0),
    ("quantize", "static", 8): KernelCost("quantize", "static", 8, 1e-6, 0.0, 3e-10),
}


def test_costs_are_told_from_sums() -> None:
    rows = []
    for number, (operations, elements) in enumerate(itertools.product((1e5, 1e6, 1e7), (1e3, 1e4, 1e5))):
        works = [Work(operations, elements), Work(operations, elements), Work(0, elements + number)]
        charges = [Charge(*key[:2], work) for key, work in zip(KNOWN, works, strict=True)]
        for made in (charges[:1], charges[1:], 3 * charges[1:2] + charges[2:]):
            seconds = sum(KNOWN[charge.kernel, charge.form, 8].seconds(charge.work) for charge in made)
            rows.append(Row(Network(str(number), "", 8, tuple(made), lambda: None), seconds))
    found = fit(rows, 0.5e-6)
    assert found.keys() == KNOWN.keys()
    for key, cost in KNOWN.items():
        wanted = (cost.fixed, cost.operation, cost.element)
        assert (found[key].fixed, found[key].operation, found[key].element) == pytest.approx(
            wanted, rel=1e-4, abs=1e-14
        )


def test_no_call_takes_less_than_one_with_nothing_to_do() -> None:
    """Large layers alone do not tell what small ones take; what follows one in float may be no call."""
    rows = []
    for elements in (1e5, 1e6, 1e7):
        for kernel, form in (("conv2d_depthwise", "static"), ("conv2d", "float"), ("add", "float")):
            charges = (Charge(kernel, form, Work(0, elements)),)
            rows.append(Row(Network("", "", 1, charges, lambda: None), 1e-10 * elements))
    found = fit(rows, 1e-6)
    assert [cost.fixed for cost in found.values()] == pytest.approx([0, 1e-6, 1e-6], abs=1e-9)
    assert [cost.element for cost in found.values()] == pytest.approx([1e-10] * 3, rel=0.1)


def test_idle_calls_are_not_merged(tmp_path: Path) -> None:
    artifact = OnnxRuntimeBackend().lower(capture(Idle(5), (torch.zeros(2, 1),)), tmp_path / "idle.onnx")
    assert kernel_counts(artifact.path, SessionSettings.of(artifact.session_options)) == {"Floor": 3, "Ceil": 2}


def test_a_network_is_counted_in_both_forms() -> None:
    layers = nn.Conv2d(8, 8, 1), nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Hardswish()), nn.Conv2d(8, 8, 1)
    case = Case("", nn.Sequential(*layers), (8, 6, 6), skip=("0", "2"))
    program = capture(case.module.eval(), (torch.randn(2, *case.shape),))
    floating, static = (
        Counter((charge.kernel, charge.form) for charge in charges_of(program, DESCRIPTION_AVX2, case, mode))
        for mode in (None, "static")
    )
    outer = {("call", "float"): 1, ("edge", "float"): 1, ("conv2d_pointwise", "float"): 2}
    assert floating == {**outer, ("conv2d_depthwise", "float"): 1, ("hardswish", "float"): 1}
    inner = ("conv2d_depthwise", "hardsigmoid", "mul", "quantize_map", "dequantize_map")
    assert static == {**outer, **{(kernel, "static"): 1 for kernel in inner}}


def test_no_two_cases_have_one_name() -> None:
    names = [case.name for case in itertools.islice(cases(), 40)]
    assert len(set(names)) == len(names)


def test_what_a_call_takes_whatever_it_has_to_do_is_told_by_small_ones() -> None:
    smallest: dict[str, int] = {}
    for case in itertools.takewhile(lambda case: case.name.split()[0] != "head", cases()):
        kind = case.name.split()[0]
        smallest[kind] = min(smallest.get(kind, 1 << 30), math.prod(case.shape))
    assert {smallest[kind] for kind in ("depthwise", "add", "mul", "leaky_relu", "cat", "max_pool")} == {16 * 8 * 8}


@pytest.mark.parametrize(
    ("machine", "saturates", "kind"),
    [("x86_64", True, "x86_64 without VNNI"), ("x86_64", False, "x86_64 with VNNI"), ("aarch64", False, "aarch64")],
)
def test_a_table_says_of_which_kind_its_processor_is(
    machine: str, saturates: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(measure_costs, "products_saturate", lambda: saturates)
    monkeypatch.setattr(measure_costs, "said_of_processor", lambda _: ["AMD EPYC"])
    assert _table("here", {}).processor == f"AMD EPYC, {kind}"
