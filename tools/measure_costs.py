"""Measures what a runtime's kernels take on this machine, and writes the table of costs that its backend ships.

    python tools/measure_costs.py [--target onnxruntime-x86-avx2] [-o backends/onnxruntime/costs_x86_avx2.json]

Every case is a small network around one kernel. It is lowered as floats and as integers, as deployed, and timed: one
thread, process CPU time, the minimum of interleaved rounds. What each kernel takes in each form, fixed, for each
operation and for each element, is then fitted to all times at once (non-negative least squares of relative errors);
what is a call of its own takes no less, fixed, than one that has nothing to do, which is timed beside them. Prints how
far the fit is off on cases that were left out of it. Takes a few minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from graphopt.backends.onnx_execution.saturating_products import products_saturate
from graphopt.capturing.capture import capture
from graphopt.ir.program import Program
from graphopt.measure.processor import X86, said_of_processor
from graphopt.measure.work import Workload
from graphopt.passes.int8 import Int8, Int8Options
from graphopt.passes.quantization.paying import Accounts, Charge
from graphopt.passes.quantization.placing import Placer
from graphopt.pipeline.context import Context
from graphopt.pipeline.registry import backend
from graphopt.targets.backend import Backend
from graphopt.targets.costs import CostTable, KernelCost, Work
from graphopt.targets.description import TargetDescription
from graphopt.testing import TensorSamples
from tools.measure_costs_cases import Case, Mode, cases

_BURST = 2e-3  # seconds of calls between two readings of the clock
_EVERY = 4  # of so many cases one is left out to try the fit on
_OUTSIDE = ("call", "edge")  # what is of a whole graph: starting it, and what comes in and goes out
_LAYERS = ("conv", "gemm", "matmul")  # what kernels' names start with that a runtime does not merge into others
_CHAINED = 64  # calls that have nothing to do, of which one is told

_BATCHES = (1, 8)

_Key = tuple[str, str, int]


@dataclass(frozen=True)
class Network:
    """A case in one form: what it is made of for each sample, how many a call has, and the call."""

    case: str
    form: str
    samples: int
    charges: tuple[Charge, ...]
    call: Callable[[], object]

    @property
    def name(self) -> str:
        """What it is called."""
        return f"{self.case}, {self.form}, {self.samples}"


@dataclass(frozen=True)
class Row:
    """A network and how long it takes."""

    network: Network
    seconds: float


def main() -> None:
    """Measure, fit, say how well, write."""
    options = _arguments()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    runtime = backend(options.target)
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        wanted = [case for case in cases() if options.only in case.name]
        networks = [network for case in wanted for network in _lowered(case, runtime, Path(folder))]
        idle = [_idle(count, runtime, Path(folder)) for count in (1, 1 + _CHAINED)]
    *rows, one, many = _timed([*networks, *idle], options.sweeps)
    least = max(many.seconds - one.seconds, 0.0) / _CHAINED
    for row in rows:
        print(
            f"{row.network.case}, {row.network.form}, {row.network.samples}: {1e6 * row.seconds:.1f} us",
            file=sys.stderr,
        )
    print(f"{len(rows)} networks in {time.time() - started:.0f} s on {_processor()}; a call takes {1e6 * least:.2f} us")
    held = {case.name for case in wanted[::_EVERY]}
    fitted_to = fit([row for row in rows if row.network.case not in held], least)
    _report("left out", [row for row in rows if row.network.case in held], fitted_to)
    found = fit(rows, least)
    _report("fitted", rows, found)
    if options.output:
        options.output.write_text(_table(options.target, found).to_json())


def _table(target: str, found: Mapping[_Key, KernelCost]) -> CostTable:
    """Return what is fitted with as many digits as are known."""
    costs = tuple(
        dataclasses.replace(
            cost, **{part: float(f"{getattr(cost, part):.3g}") for part in ("fixed", "operation", "element")}
        )
        for (kernel, *_), cost in sorted(found.items())
        if kernel not in _OUTSIDE
    )
    return CostTable(target, _processor(), f"onnxruntime {onnxruntime.__version__}", costs)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="onnxruntime-x86-avx2", help="whose kernels; this machine must be like it")
    parser.add_argument("--sweeps", type=int, default=20, help="how often each is timed, of which the fastest counts")
    parser.add_argument("--only", default="", help="cases whose names hold this")
    parser.add_argument("-o", "--output", type=Path, help="where to write the table")
    return parser.parse_args()


def _processor() -> str:
    """Return which one this is, and of which kind."""
    kind = platform.machine()
    vnni = f" {'without' if products_saturate() else 'with'} VNNI" if kind in X86 else ""
    return f"{', '.join(said_of_processor('model name')) or platform.processor()}, {kind}{vnni}"


def _lowered(case: Case, runtime: Backend, folder: Path) -> Iterator[Network]:
    """Yield the networks that a case is in each form, loaded."""
    program, target = capture(case.module.eval(), (torch.randn(2, *case.shape),)), runtime.description
    drawn = np.random.default_rng(0).standard_normal((max(_BATCHES), *case.shape), dtype=np.float32)
    for mode in (None, *case.modes):
        lowered = program
        if mode:
            ctx = Context(original=program, targets=(target,), target=target)
            ctx.samples = TensorSamples((torch.randn(8, *case.shape),))
            int8 = Int8(Int8Options(mode=mode, accuracy="fast", guard="none", skip=case.skip))
            lowered = int8.apply(program, int8.plan(program, ctx))
        session = runtime.lower(lowered, folder / "case.onnx").session(threads=1)
        charges = charges_of(program, target, case, mode)
        for samples in _BATCHES:
            call = functools.partial(session, drawn[:samples])
            yield Network(case.name, mode or "float", samples, charges, call)


class Idle(nn.Module):
    """Calls that have nothing to do, and which no runtime merges."""

    def __init__(self, count: int) -> None:
        """Prepare to make so many."""
        super().__init__()
        self._count = count

    def forward(self, x: Tensor) -> Tensor:
        """Round what is whole already."""
        for number in range(self._count):
            x = x.ceil() if number % 2 else x.floor()
        return x


def _idle(count: int, runtime: Backend, folder: Path) -> Network:
    program = capture(Idle(count).eval(), (torch.zeros(2, 1),))
    session = runtime.lower(program, folder / "idle.onnx").session(threads=1)
    return Network(f"idle x{count}", "float", 1, (), functools.partial(session, np.zeros((1, 1), np.float32)))


def charges_of(program: Program, target: TargetDescription, case: Case, mode: Mode | None) -> tuple[Charge, ...]:
    """Return what a network pays for, as the guard counts it; without a mode for all of it in float."""
    everything = Accounts(*reversed(Placer(target, default=mode).run(program)))
    placed = Accounts(*reversed(Placer(target, case.skip, mode).run(program))) if mode else None
    charges = [Charge("call", "float", Work(0, 0))]
    for unit in everything.sites:
        on_integers = placed is not None and unit in placed.sites
        charges += placed.on_integers(unit) if on_integers else everything.as_float(unit)
    for value in placed.handovers() if placed else ():
        if value.producer:
            charges += [placed.moving("dequantize", value)] if "" in value.readers else []
        elif any(value.readers):
            charges.append(placed.moving("quantize", value))
    return (*charges, _edges(program, placed.sites if placed else ()))


def _edges(program: Program, integers: Collection[str]) -> Charge:
    """Return what is paid for images that come in and go out of a network as floats, which its kernels reorder."""
    work, elements = Workload(program), 0.0
    for node in program.graph.nodes:
        inside = [user for user in node.users if node.op == "placeholder" and user.name not in integers]
        outside = any(user.op == "output" for user in node.users) and node.name not in integers
        if (inside or outside) and len(node.meta["val"].shape) > 3:
            elements += work.elements(node)
    return Charge("edge", "float", Work(0, elements))


def _timed(networks: Sequence[Network], sweeps: int) -> list[Row]:
    """Call all in turn, again and again: what slows the machine down for a while slows none down for good."""
    repeats = [max(1, round(_BURST / max(_burst(network, 3), 1e-6))) for network in networks]
    best = [float("inf")] * len(networks)
    for _ in range(sweeps):
        for index, network in enumerate(networks):
            best[index] = min(best[index], _burst(network, repeats[index]))
    return [Row(network, seconds) for network, seconds in zip(networks, best, strict=True)]


def _burst(network: Network, calls: int) -> float:
    network.call()
    start = time.process_time()
    for _ in range(calls):
        network.call()
    return (time.process_time() - start) / calls


def fit(rows: Sequence[Row], least: float) -> dict[_Key, KernelCost]:
    """Find what each kernel takes so that the sums come nearest to the times, in relative terms.

    Args:
        rows: of networks of these kernels.
        least: seconds that a call takes which has nothing to do. Integers and layers always are calls; what follows a
            layer in float may be merged into it.
    """
    keys = sorted({_key(row.network, charge) for row in rows for charge in row.network.charges})
    places = {key: 3 * index for index, key in enumerate(keys)}
    matrix = np.zeros((len(rows), 3 * len(keys)))
    for number, row in enumerate(rows):
        for charge in row.network.charges:
            start, samples = places[_key(row.network, charge)], row.network.samples
            matrix[number, start : start + 3] += (1.0, samples * charge.work.operations, samples * charge.work.elements)
    matrix /= np.array([row.seconds for row in rows])[:, None]
    size = np.maximum(np.abs(matrix).max(0), 1e-30)  # of columns, which differ by ten orders of magnitude
    known = np.zeros(matrix.shape[1])
    known[[start for key, start in places.items() if _is_a_call(*key)]] = least
    more, _ = nnls(matrix / size, 1 - matrix @ known, maxiter=100 * matrix.shape[1])
    found = known + more / size
    return {key: KernelCost(*key, *map(float, found[start : start + 3])) for key, start in places.items()}


def _is_a_call(kernel: str, form: str, _: int) -> bool:
    return form != "float" or kernel.startswith(_LAYERS)


def _key(network: Network, charge: Charge) -> _Key:
    return charge.kernel, charge.form, network.samples


def _report(what: str, rows: Sequence[Row], costs: Mapping[_Key, KernelCost]) -> None:
    errors = []
    for row in rows:
        known = [costs.get(_key(row.network, charge)) for charge in row.network.charges]
        if None in known:
            continue
        said = sum(cost.seconds(charge.work) for cost, charge in zip(known, row.network.charges, strict=True) if cost)
        errors.append(
            (
                abs(said / row.seconds - 1),
                f"{row.network.name} {said / row.seconds:.2f}",
            )
        )
    errors.sort()
    sizes = [error for error, _ in errors]
    print(f"{what}: {len(errors)} networks, relative error median {median(sizes):.3f}, largest {sizes[-1]:.3f}")
    print("  worst: " + ", ".join(text for _, text in errors[-8:]))


if __name__ == "__main__":
    main()
