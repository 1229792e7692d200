"""How much of the accuracy that few bits cost `qat` wins back on ResNet-20, without labels.

    python tools/bench_qat.py --data DIR [--images 5120] [--epochs 8] [--quantize PIPELINE ...] [--qat OPTIONS]

Prints one row per stage: top-1 on the 10,000 test images, which are scored once each, and seconds; behind each pipeline
the share of what it lost that training won back.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from cifar10 import images, top1, trained_resnet, training_images

from graphopt.backends.onnxruntime.description import DESCRIPTION
from graphopt.capturing.capture import capture
from graphopt.ir.program import Program
from graphopt.pipeline.context import Context
from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.runner import run
from graphopt.testing import TensorSamples

_QUANTIZE = ("int8:weight_bits=4:guard=none", "int8:weight_bits=3:guard=none")


def main() -> None:
    """Run the benchmark and print its table."""
    options = _arguments()
    torch.set_num_threads(options.threads)
    test = images(options.data, "cifar10_test")
    unlabelled = training_images(options.data, options.images)[0]
    original = capture(trained_resnet(options.data, options.depth), (unlabelled[:2],))
    qat = f"qat:epochs={options.epochs}{':' if options.qat else ''}{options.qat}"
    print(f"{'':64s} {'top-1 %':>8s} {'seconds':>8s}")
    whole = _row("unoptimised", (original, 0.0), test)
    for quantize in options.quantize:
        rounded = _row(quantize, _timed(quantize, original, unlabelled), test)
        trained = _row(f"{quantize},{qat}", _timed(f"{quantize},{qat}", original, unlabelled), test)
        if whole > rounded:
            print(
                f"  won back {(trained - rounded) / (whole - rounded):.0%} of {whole - rounded:.2f} points", flush=True
            )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with CIFAR-10 and the trained ResNets")
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--images", type=int, default=5120, help="unlabelled images")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quantize", nargs="+", default=_QUANTIZE, help="pipelines that cost accuracy")
    parser.add_argument("--qat", default="", help="options of qat other than the defaults")
    return parser.parse_args()


def _timed(passes: str, original: Program, samples: torch.Tensor) -> tuple[Program, float]:
    start = time.perf_counter()
    ctx = Context(original=original, targets=(DESCRIPTION,)).with_data(TensorSamples((samples,)))
    outcome = run(Pipeline.parse(passes), original, ctx)
    seconds = time.perf_counter() - start
    if "qat" in passes:
        print(f"  held-out losses: {outcome.plans[-1][1].measured}", flush=True)
    return outcome.programs[DESCRIPTION.name], seconds


def _row(what: str, found: tuple[Program, float], test: tuple[torch.Tensor, torch.Tensor]) -> float:
    program, seconds = found
    score = top1(program, *test)
    print(f"{what:64s} {score:8.2f} {seconds:8.0f}", flush=True)
    return score


if __name__ == "__main__":
    main()
