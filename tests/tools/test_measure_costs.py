"""Costs of kernels from times of networks: what was put in comes out, and a network is counted as the guard counts."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from torch import nn

from graphopt.backends.onnxruntime.description import DESCRIPTION_AVX2
from graphopt.capturing.capture import capture
from graphopt.passes.quantization.paying import Charge
from graphopt.targets.costs import KernelCost, Work
from tools.measure_costs import Network, Row, charges_of, fit
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
    found = fit(rows)
    assert found.keys() == KNOWN.keys()
    for key, cost in KNOWN.items():
        wanted = (cost.fixed, cost.operation, cost.element)
        assert (found[key].fixed, found[key].operation, found[key].element) == pytest.approx(
            wanted, rel=1e-4, abs=1e-14
        )


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
