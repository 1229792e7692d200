"""What graphopt adds to exporting a model: `--passes prune,int8` on ResNet-50 against torch.onnx.export and saving.

    python tools/bench_overhead.py [--rounds 3] [--profile]

Rounds alternate the two and the ratio is taken within a round, of processor time on one thread: other work on the
machine does not count. Calibration is left out, as work on the user's data; nothing is compared with the original
(`bench=False`).
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import pstats
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

# torchvision's compiled operators belong to another torch; its models do not need them
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
import torchvision  # noqa: E402

import graphopt  # noqa: E402
from graphopt.backends.onnxruntime import OnnxRuntimeBackend  # noqa: E402
from graphopt.measure.equivalence import Probe  # noqa: E402
from graphopt.statistics import calibration  # noqa: E402

LIMIT = 1.5


class Clock:
    """Seconds of processor time spent inside wrapped functions, by label."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def around(self, owner: Any, name: str, label: Callable[..., str]) -> Iterator[None]:
        """Time every call of `owner.name` while the block runs."""
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return original(*args, **kwargs)
            finally:
                key = label(*args, **kwargs)
                self.seconds[key] = self.seconds.get(key, 0.0) + time.process_time() - start

        setattr(owner, name, timed)
        try:
            yield
        finally:
            setattr(owner, name, original)


def export(model: torch.nn.Module, x: torch.Tensor, folder: Path) -> float:
    """Return processor seconds of torch.onnx.export and saving."""
    start = time.process_time()
    batch = torch.export.Dim.DYNAMIC
    program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    assert program is not None
    program.save(folder / "plain.onnx")
    return time.process_time() - start


def optimise(model: torch.nn.Module, x: torch.Tensor, folder: Path) -> tuple[float, dict[str, float]]:
    """Return processor seconds of the whole job without calibration, and those of its parts."""
    clock = Clock()

    start = time.process_time()
    with (
        clock.around(calibration, "observe", lambda *_, **__: "calibration"),
        clock.around(OnnxRuntimeBackend, "lower", lambda *_, **__: "lowering"),
        clock.around(OnnxRuntimeBackend, "verify", lambda *_, **__: "verification"),
        clock.around(Probe, "measure", lambda *_, **__: "output errors"),
    ):
        program = graphopt.capture(model, (x[:2],))
        clock.seconds["capture"] = time.process_time() - start
        graphopt.optimize(program, data=x, passes="prune,int8", bench=False, cache=False).save(folder / "out")
    total = time.process_time() - start
    return total - clock.seconds["calibration"], clock.seconds


def main() -> None:
    """Print a row per round, the median ratio, and where the time goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--profile", action="store_true", help="print the functions that take longest")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x = torchvision.models.resnet50().eval(), torch.randn(options.samples, 3, 224, 224)
    table = Table("round", "export + save (s)", "graphopt (s)", "ratio", "parts (s)")
    ratios = []
    with tempfile.TemporaryDirectory() as home:
        small = torchvision.models.resnet18().eval()
        export(small, x[:2], Path(home))  # imports and caches, of both
        optimise(small, x, Path(home))
        for number in range(options.rounds):
            plain = export(model, x[:2], Path(home))
            ours, parts = optimise(model, x, Path(home))
            ratios.append(ours / plain)
            listed = ", ".join(f"{label} {seconds:.1f}" for label, seconds in parts.items())
            table.add_row(str(number + 1), f"{plain:.1f}", f"{ours:.1f}", f"{ratios[-1]:.2f}", listed)
        if options.profile:
            profile = cProfile.Profile()
            profile.runcall(optimise, model, x, Path(home))
            pstats.Stats(profile).sort_stats("cumulative").print_stats(60)
    Console(width=160).print(table)
    print(f"median ratio {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}), limit {LIMIT}")
    sys.exit(median(ratios) > LIMIT)


if __name__ == "__main__":
    main()
