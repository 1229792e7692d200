"""What it costs to take bytes: ResNet-18 in int8 that takes bytes with channels last, beside the one that takes floats.

    python tools/bench_served.py [--target onnxruntime:x86-avx2] [--rounds 60]

Weights are random. Prints processor time of one call (one thread, milliseconds, minimum of interleaved rounds), its
ratio to the model of floats (median and quartiles of rounds), and the time NumPy takes to make floats of the bytes.
"""

from __future__ import annotations

import argparse
import sys
import time
import types
from collections.abc import Callable

import numpy as np
import torch

import graphopt
from graphopt.data.served import ServedInput
from graphopt.measure.processor import said_of_processor

# The PyPI wheel of torchvision imports beside a CPU build of torch once this module exists.
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))

SERVED = {
    "bytes, mean and deviation": "x:uint8:nhwc:scale=1/255:mean=0.485,0.456,0.406:std=0.229,0.224,0.225",
    "bytes, scale alone": "x:uint8:nhwc:scale=1/255",
}
FLOATS, MAKING = "floats", "floats made by NumPy"


def main() -> None:
    """Optimize, then time in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="onnxruntime", help="what the models are lowered to")
    parser.add_argument("--rounds", type=int, default=60, help="calls of each at batch 1; an eighth of them at 8")
    given = parser.parse_args()
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    with torch.no_grad():
        model(torch.randn(8, 3, 224, 224))  # statistics that are not those of nothing
    model.eval()
    images = torch.randint(0, 256, (32, 224, 224, 3), dtype=torch.uint8)
    whole = ServedInput.parse(SERVED["bytes, mean and deviation"])
    print(*said_of_processor("model name"))

    def optimized(data: torch.Tensor, served: str | tuple[()]) -> graphopt.Session:
        result = graphopt.optimize(model, data, "int8", given.target, bench=False, served=served)
        return result.artifact.session()

    sessions = {FLOATS: optimized(whole.taken(images, torch.float32), ())}
    sessions |= {name: optimized(images, served) for name, served in SERVED.items()}
    for batch, rounds in ((1, given.rounds), (8, -(-given.rounds // 8))):
        taken = whole.taken(images[:batch], torch.float32).numpy()
        _report(batch, rounds, _calls(sessions, images[:batch].numpy(), taken))


def _calls(
    sessions: dict[str, graphopt.Session], served: np.ndarray, taken: np.ndarray
) -> dict[str, Callable[[], object]]:
    def call(name: str) -> Callable[[], object]:
        return lambda: sessions[name](taken if name == FLOATS else served)

    mean, std = (np.float32(values).reshape(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def made() -> np.ndarray:
        return np.ascontiguousarray(((served.astype(np.float32) / 255).transpose(0, 3, 1, 2) - mean) / std)

    return {**{name: call(name) for name in sessions}, MAKING: made}


def _report(batch: int, rounds: int, calls: dict[str, Callable[[], object]]) -> None:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if number > 1:  # after memory was laid out
                times[name].append(1e3 * (time.process_time() - start))
    for name, measured in times.items():
        lower, median, upper = np.percentile(np.divide(times[FLOATS], measured), [25, 50, 75])
        ratio = "" if name == MAKING else f", {median:.2f}x of floats ({lower:.2f}-{upper:.2f})"
        print(f"batch {batch}, {name}: {min(measured):.2f} ms{ratio}", flush=True)


if __name__ == "__main__":
    main()
