"""Context: what a pass may ask for while it plans. Data, time and randomness come from here and nowhere else."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar

import torch

from graphopt.data.batches import SampleSource
from graphopt.data.split import FEWEST, split
from graphopt.errors import DataError, PassError
from graphopt.ir.plain_data import Json
from graphopt.ir.program import Program
from graphopt.measure.budget import Timer
from graphopt.pipeline.checkpoints import Checkpoints, NoCheckpoints
from graphopt.targets.description import TargetDescription, channel_multiple, rank_multiple

T = TypeVar("T")
# The model's output (its own structure) and the labels of the same samples, None where the data has none; a scalar.
Loss: TypeAlias = Callable[[Any, torch.Tensor | None], torch.Tensor]


class Progress(Protocol):
    """Shows how far a long loop has come; the command line draws a bar, the API shows nothing."""

    def track(self, steps: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Yield from `steps`, reporting each."""

    def numbers(self, label: str, step: int, values: Mapping[str, float]) -> None:
        """Show what the loop of a label has computed after so many steps: its loss."""


class NoProgress:
    """Progress that shows nothing."""

    def track(self, steps: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Yield from `steps`."""
        yield from steps

    def numbers(self, label: str, step: int, values: Mapping[str, float]) -> None:
        """Show nothing."""


@dataclass(eq=False)
class Context:
    """Everything outside the program that a plan may depend on.

    Attributes:
        original: the unoptimised program, the teacher of every recovery.
        targets: descriptions of all targets of this run, for alignments. May be empty.
        target: the one target this pass plans for; None before the pipeline forks.
        floating: the last program of this run before weights were stored as integers, for passes that say they read it;
            None where it is not known.
        samples: calibration data that passes may fit, None when the user gave none.
        held_out: the samples that passes choose by, and that no pass fits; None where there are none to spare. What
            is reported is taken on others, which no pass gets.
        loss: what the model was trained for; None when the user gave none.
        metric: how good anything callable like the model is, higher is better, by labelled samples that reports do not
            look at; for passes that say they choose by it, None when the user gave none.
        timers: by target name, what measures latency in that runtime, where it executes on this machine.
        seed: every random draw descends from it.
        progress: shows long loops.
        remember: by a name of the pass's own returns what was computed in an earlier run of the same step on the same
            things, or computes and keeps it: what takes long, so that a killed run need not do it again.
        checkpoints: keep where a computation has come to, so that a killed run goes on there.
    """

    original: Program
    targets: tuple[TargetDescription, ...] = ()
    target: TargetDescription | None = None
    floating: Program | None = None
    samples: SampleSource | None = None
    held_out: SampleSource | None = None
    loss: Loss | None = None
    metric: Callable[[Callable[..., Any]], float] | None = None
    timers: Mapping[str, Timer] = field(default_factory=dict)
    seed: int = 0
    progress: Progress = field(default_factory=NoProgress)
    remember: Callable[[str, Callable[[], dict[str, Json]]], dict[str, Json]] = lambda name, compute: compute()
    checkpoints: Checkpoints = field(default_factory=NoCheckpoints)
    cache: dict[int, tuple[Program, dict[str, Any]]] = field(default_factory=dict, repr=False)

    def with_data(self, source: SampleSource) -> Context:
        """Return this context with the samples of `source`, of which some are held out and some left for reports."""
        fitted, held_out, _ = split(source, self.original)
        return dataclasses.replace(self, samples=fitted, held_out=held_out)

    @property
    def channel_multiple(self) -> int:
        """Alignment of channel counts that suits every target."""
        return channel_multiple(self.targets)

    @property
    def rank_multiple(self) -> int:
        """Alignment of ranks that suits every target."""
        return rank_multiple(self.targets)

    def generator(self, purpose: str) -> torch.Generator:
        """Return a random generator that depends on the seed and on `purpose` only."""
        digest = hashlib.sha256(f"{self.seed}/{purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def need_target(self, pass_name: str) -> TargetDescription:
        """Return the target, or explain that the pass cannot plan without one."""
        if self.target is None:
            raise PassError(
                f"Pass `{pass_name}` decides by what the target's kernels support, and no target was given. "
                "Try --target onnxruntime."
            )
        return self.target

    def need_timer(self, pass_name: str) -> Timer:
        """Return what measures latency in this target's runtime, or explain that nothing can."""
        target = self.need_target(pass_name)
        if target.name not in self.timers:
            raise PassError(
                f"Pass `{pass_name}` is to decide by measured latency, and `{target.name}` is not timed on this "
                "machine. Decide by something else (costs, FLOPs), or give --target onnxruntime."
            )
        return self.timers[target.name]

    def need_held_out(self, pass_name: str) -> SampleSource:
        """Return the samples to judge by, or explain that there are too few."""
        if self.held_out is None:
            raise DataError(
                f"Pass `{pass_name}` needs samples to learn from and others to judge by, and of this data none can be "
                f"spared: it takes at least {FEWEST}, and two batches of a program with a fixed batch size. Give a few "
                "hundred typical inputs."
            )
        return self.held_out

    def need_samples(self, pass_name: str, purpose: str) -> SampleSource:
        """Return the calibration data, or explain what it is needed for."""
        if self.samples is None:
            raise DataError(
                f"Pass `{pass_name}` needs data {purpose}, and none was given. Give a few hundred typical inputs: "
                "--data samples.npz (or data=... from Python)."
            )
        return self.samples

    def need_metric(self, pass_name: str, purpose: str) -> Callable[[Callable[..., Any]], float]:
        """Return what judges models, or explain what it is needed for."""
        if self.metric is None:
            raise DataError(
                f"Pass `{pass_name}` needs labelled data {purpose}, and none were given. Give --eval test.npz (or "
                "eval=... from Python)."
            )
        return self.metric

    def analysis(self, program: Program, name: str, compute: Callable[[], T]) -> T:
        """Return the analysis `name` of `program`, computed once however many passes ask.

        The program is kept alive with its results until `forget`, so identity is a safe key.
        """
        _, known = self.cache.setdefault(id(program.graph_module), (program, {}))
        if name not in known:
            known[name] = compute()
        return known[name]  # type: ignore[no-any-return]

    def forget(self, program: Program) -> None:
        """Let go of a program that no further pass reads, and of what was found out about it."""
        self.cache.pop(id(program.graph_module), None)
