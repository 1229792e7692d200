"""What float16 is worth in ONNX Runtime on a CPU: weights stored in it, and computing in it, against float32.

    python tools/bench_half.py [--seconds 10]

Weights are random: neither bytes nor time depend on them. Prints megabytes and the ratio of processor time (one
thread, batch 1, median and quartiles of paired runs).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import types
from pathlib import Path

import torch
from torch import nn

from graphopt.capturing.capture import capture
from graphopt.ir.program import Program
from graphopt.measure.bench import compare
from graphopt.measure.processor import said_of_processor
from graphopt.passes.fold import Fold
from graphopt.passes.half import Half, HalfOptions
from graphopt.pipeline.context import Context
from graphopt.pipeline.registry import backend

# The PyPI wheel of torchvision imports beside a CPU build of torch once this module exists.
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))


def main() -> None:
    """Convert, lower, time in turn with float32."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="time to spend on each pair")
    seconds = parser.parse_args().seconds
    import torchvision

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(384, 6, 1536, batch_first=True, activation="gelu")
    encoder = nn.TransformerEncoder(layer, 6)
    for weight in encoder.parameters():  # copies of one layer would be stored once
        nn.init.normal_(weight, std=0.02)
    subjects = {
        "ResNet-18": (torchvision.models.resnet18(), torch.randn(2, 3, 224, 224)),
        "encoder, 6 x 384": (encoder, torch.randn(2, 64, 384)),
    }
    print(*said_of_processor("model name"))
    for name, (model, example) in subjects.items():
        program = _run(Fold(), capture(model.eval(), (example,)))
        _report(name, program, seconds)


def _report(name: str, program: Program, seconds: float) -> None:
    runtime = backend("onnxruntime")
    with tempfile.TemporaryDirectory() as home:
        before = runtime.lower(program, Path(home) / "float32.onnx")
        print(f"{name}: float32 {before.size / 1e6:.1f} MB")
        for said, compute in (("stored", "no"), ("computed", "yes")):
            half = _run(Half(HalfOptions(compute=compute)), program)  # type: ignore[arg-type]
            after = runtime.lower(half, Path(home) / f"{said}.onnx")
            error = runtime.verify(after, half)
            ratio = compare(before, after, seconds=seconds).recorded.cpu_ratio
            spread = f"{ratio.median:.2f}x ({ratio.lower:.2f}-{ratio.upper:.2f})"
            print(f"{name}: {said} in float16 {after.size / 1e6:.1f} MB, {spread} faster, verified to {error:.1e}")


def _run(pass_: Fold | Half, program: Program) -> Program:
    target = backend("onnxruntime").description
    plan = pass_.plan(program, Context(original=program, targets=(target,), target=target))
    return pass_.apply(program, plan) if plan.sites else program  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
