"""What graphopt adds to exporting a model: `--passes prune,int8` on ResNet-50 against torch.onnx.export and saving.

    python tools/bench_overhead.py [--rounds 3] [--profile]

Rounds alternate the two and the ratio is taken within a round. Calibration is left out, as work on the user's data;
nothing is compared with the original (`bench=False`).
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

LIMIT = 2.3


class Clock:
    """Seconds spent inside wrapped functions, by label."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def around(self, owner: Any, name: str, label: Callable[..., str]) -> Iterator[None]:
        """Time every call of `owner.name` while the block runs."""
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                key = label(*args, **kwargs)
                self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - start

        setattr(owner, name, timed)
        try:
            yield
        finally:
            setattr(owner, name, original)


def export(model: torch.nn.Module, x: torch.Tensor, folder: Path) -> float:
    """Return seconds of torch.onnx.export and saving."""
    start = time.perf_counter()
    batch = torch.export.Dim.DYNAMIC
    program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    assert program is not None
    program.save(folder / "plain.onnx")
    return time.perf_counter() - start


def optimise(model: torch.nn.Module, x: torch.Tensor, folder: Path) -> tuple[float, dict[str, float]]:
    """Return seconds of the whole job without calibration, and those of its parts."""
    clock = Clock()

    start = time.perf_counter()
    with (
        clock.around(calibration, "observe", lambda *_, **__: "calibration"),
        clock.around(OnnxRuntimeBackend, "lower", lambda *_, **__: "lowering"),
        clock.around(OnnxRuntimeBackend, "verify", lambda *_, **__: "verification"),
        clock.around(Probe, "measure", lambda *_, **__: "output errors"),
    ):
        program = graphopt.capture(model, (x[:2],))
        clock.seconds["capture"] = time.perf_counter() - start
        graphopt.optimize(program, data=x, passes="prune,int8", bench=False, cache=False).save(folder / "out")
    total = time.perf_counter() - start
    return total - clock.seconds["calibration"], clock.seconds


def main() -> None:
    """Print a row per round, the median ratio, and where the time goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--profile", action="store_true", help="print the functions that take longest")
    options = parser.parse_args()
    torch.manual_seed(0)
    model, x = torchvision.models.resnet50().eval(), torch.randn(options.samples, 3, 224, 224)
    table = Table("round", "export + save (s)", "graphopt (s)", "ratio", "parts (s)")
    ratios = []
    with tempfile.TemporaryDirectory() as home:
        export(model, x[:2], Path(home))  # imports and caches
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
