"""Job: a model and its data, opened once, on which any number of pipelines run and whose outcomes are delivered."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from graphopt.caching.steps import Memory, StepCache
from graphopt.caching.store import Store
from graphopt.capturing.load import with_data
from graphopt.capturing.model_calls import gradients_recorded
from graphopt.data import Samples
from graphopt.data.batches import batch_count
from graphopt.data.served import Served, ServedInput, served_inputs
from graphopt.data.split import Split, split
from graphopt.errors import UsageError
from graphopt.files import ScratchDirectory
from graphopt.ir.devices import device_called, device_memory
from graphopt.ir.exporting import let_exports_read
from graphopt.ir.global_state import one_thread_at_a_time, random_state_kept
from graphopt.ir.memory import give_back
from graphopt.ir.ownership import own_tensors, storage_keys
from graphopt.ir.program import Program
from graphopt.ir.regions import compiled_for_their_shapes
from graphopt.job.checks import State, check_as_handed_out, check_as_opened, check_weights, notes_on_types, state_of
from graphopt.job.deliver import Delivery, Originals, deliver
from graphopt.job.judging import Judge, judge_of, metrics_for, probe_inputs
from graphopt.job.manifest import Manifest, fingerprint
from graphopt.job.payloads import lent_by, set_aside
from graphopt.job.recorder import Recorder
from graphopt.job.replaying import carry_out
from graphopt.job.report import Report, Row
from graphopt.job.result import Result
from graphopt.job.sample_notes import sample_notes
from graphopt.measure.equivalence import Probe
from graphopt.measure.stopwatch import Stopwatch
from graphopt.pipeline import runner
from graphopt.pipeline.context import Context, Loss, NoProgress, Progress
from graphopt.pipeline.hooks import FullCheck, Hook
from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.plan import Plan
from graphopt.pipeline.registry import DEFAULT_TARGET, PassRegistry, backend, backends_named
from graphopt.targets.backend import Backend


@dataclass(frozen=True)
class Outcome:
    """What one pipeline made of a job's program.

    Attributes:
        pipeline: the pipeline.
        programs: the final program of each target, keyed by target name; "" where no pass asked for one.
        plans: (target, plan) in the order they were made; target "" before the pipeline forks.
        report: a row for the original and for each step, refusals and notes.
        metric: what reports say of programs, None without one; of the labelled data half, where a pass chose by the
            other.
        handed_out: fingerprints of those of the programs that a result holds, where they may be trained.
    """

    pipeline: Pipeline
    programs: dict[str, Program]
    plans: tuple[tuple[str, Plan], ...]
    report: Report
    metric: Judge | None = field(default=None, repr=False)
    handed_out: dict[str, str] = field(default_factory=dict, repr=False)


@dataclass(eq=False)
class Job:
    """A program with its data, what judges it, and the targets it is for.

    Attributes:
        original: the unoptimised program.
        samples: calibration data, bound to the program's inputs; None where the user gave none.
        evaluation: labelled data or a function, as `optimize` takes it; None for no metric.
        backends: what outcomes are lowered to; none: passes that decide by their target decide for ONNX Runtime.
        loss: what the model was trained for; None where the user gave none.
        seed: every random draw descends from it.
        progress: shows long loops.
        name: what reports call the model.
        device: where passes compute, "auto" for the accelerator if there is one; None: where the model is.
        cache: whether plans are kept, and those of the same passes on the same things are used again.
        served: which of its inputs the original takes as they are served, not as the model takes them.
        metric: what `evaluation` says of a model, None without it.
    """

    original: Program
    samples: Samples | None = None
    evaluation: Any = None
    backends: tuple[Backend, ...] = ()
    loss: Loss | None = None
    seed: int = 0
    progress: Progress = field(default_factory=NoProgress)
    name: str = "program"
    device: str | torch.device | None = None
    cache: bool = True
    served: tuple[ServedInput, ...] = ()
    metric: Judge | None = field(default=None, init=False)
    _memory: Memory = field(default_factory=Memory, init=False, repr=False)
    _stopwatches: dict[str, Stopwatch] = field(default_factory=dict, init=False, repr=False)
    _opened: State = field(default_factory=dict, init=False, repr=False)
    _lent: frozenset[Hashable] = field(default=frozenset(), init=False, repr=False)  # storages of a module's tensors
    _whole_row: Row | None = field(default=None, init=False, repr=False)  # of the original, judged by all there is

    @classmethod
    @one_thread_at_a_time()
    @random_state_kept()
    @device_memory()
    def open(
        cls,
        model: nn.Module | Program,
        data: Any = None,
        *,
        target: str | Backend | Sequence[str | Backend] | None = DEFAULT_TARGET,
        eval: Any = None,
        loss: Loss | None = None,
        seed: int = 0,
        dynamic_shapes: Any = None,
        progress: Progress | None = None,
        name: str | None = None,
        device: str | torch.device | None = None,
        cache: bool = True,
        served: Served = (),
    ) -> Self:
        """Open a model and its data, once for every pipeline that runs on them; arguments are those of `optimize`.

        A module must not be trained, moved or cast as long as the job is in use, which reads its tensors.

        Raises:
            GraphOptError: a target is not known, the data do not fit, or the model cannot be captured.
        """
        backends = backends_named(target)
        heads = served_inputs(served)
        program, samples = with_data(model, data, dynamic_shapes, served=heads, share_tensors=True)
        name = name or ("program" if isinstance(model, Program) else type(model).__name__)
        lent = frozenset() if isinstance(model, Program) else storage_keys(program.graph_module)
        job = cls(
            program,
            samples,
            evaluation=eval,
            backends=backends,
            loss=loss,
            seed=seed,
            progress=progress or NoProgress(),
            name=name,
            device=device,
            cache=cache,
            served=heads,
        )
        job._lent = lent
        return job

    @one_thread_at_a_time()
    @gradients_recorded()
    def __post_init__(self) -> None:
        """Look at the weights and open the evaluation data: what is wrong is said before anything expensive runs.

        Raises:
            CaptureError: a weight of the model is not finite.
            UsageError: a backend has no name of its own that files can bear, or the device is not there.
            PassError: the device has too little memory.
        """
        self.backends = backends_named(self.backends)
        self._given = self.original.evaluated()
        self.device = self._given.device if self.device is None else device_called(self.device)
        self.original = self._given.to(self.device)
        if self.samples is not None:
            self.samples = self.samples.on(self.device)
        check_weights(self.original)
        self._opened = state_of(self._given)
        self.metric = None if self.evaluation is None else judge_of(self.evaluation, self.original, self.progress)

    @one_thread_at_a_time()
    @random_state_kept()
    @gradients_recorded()
    def check_targets(self) -> None:
        """Refuse what is sure to be refused by a target, before passes work on it.

        Raises:
            LoweringError: a runtime does not compute in the program's types.
        """
        for item in self.backends:
            item.accepts(self._given.to("cpu"))

    @one_thread_at_a_time()
    @random_state_kept()
    @gradients_recorded()
    @compiled_for_their_shapes()
    @device_memory()
    def run(self, pipeline: Pipeline, *, hooks: Sequence[Hook] = (), check: str = "fast") -> Outcome:
        """Run a pipeline on the original program.

        Args:
            pipeline: which passes.
            hooks: called around every pass.
            check: "fast", or "full" to export again and run each pass's own proof after it.

        Raises:
            GraphOptError: as the passes do; nothing is left behind.
        """
        if check not in ("fast", "full"):
            raise UsageError(f"check={check!r} is not known. Use 'fast' or 'full'.")
        check_as_opened(self._given, self._opened)
        choosing, judging, noted = metrics_for(pipeline, self.metric)
        report = self._new_report(pipeline, judging)
        report.notes += noted
        deciding = self.backends
        if not deciding and pipeline.fork() < len(pipeline.steps):
            deciding = (backend(DEFAULT_TARGET),)
            first = pipeline.steps[pipeline.fork()].text
            report.notes.append(f"target: none was given, so `{first}` and what follows decided for {DEFAULT_TARGET}")
        ctx = Context(
            original=self.original,
            targets=tuple(item.description for item in deciding),
            samples=self._split.fitted if self._split else None,
            held_out=self._split.held_out if self._split else None,
            loss=self.loss,
            metric=choosing,
            timers={
                item.name: self._stopwatches.setdefault(item.name, Stopwatch(item))
                for item in deciding
                if item.times_here
            },
            seed=self.seed,
            progress=self.progress,
        )
        lossy = any(step.instance.tolerance is None for step in pipeline.steps)
        if self._split and not self._split.unseen and lossy:
            seen = "chose by" if self._split.held_out else "may have fitted"
            report.notes.append(f"data: too few samples to keep some unseen: errors are taken on what passes {seen}")
        report.notes += [f"data: {note}" for note in (self._sample_notes if lossy else ())]
        checks = [FullCheck()] if check == "full" else []
        kept = self._step_cache()
        if kept is not None:
            ctx = dataclasses.replace(kept.reads.watch(ctx), remember=kept.part, checkpoints=kept)
        recorder = Recorder(report, self.original, self._probe, judging, kept, several=len(deciding) > 1)
        made = runner.run(pipeline, self.original, ctx, [recorder, *checks, *hooks], kept)
        if kept is not None and kept.found:
            said = ", ".join(f"`{text}`" for text in kept.found)
            report.notes.append(
                f"cache: decided in an earlier run, on the same things: {said} (--no-cache decides anew)"
            )
        return Outcome(pipeline, made.programs, set_aside(made.plans, made.programs.values()), report, judging)

    @one_thread_at_a_time()
    @random_state_kept()
    @gradients_recorded()
    @compiled_for_their_shapes()
    @device_memory()
    def deliver(self, outcome: Outcome, *, bench: bool = True, sizes: bool | None = None) -> Result:
        """Lower the programs of an outcome, verify and time what came of it.

        Args:
            outcome: what `run` returned.
            bench: whether to time each artifact against the unoptimised program in the same runtime.
            sizes: whether to lower the unoptimised program so that bytes on disk can be compared; None: where it is
                timed.

        Returns:
            Everything; artifacts live in a temporary directory for as long as anybody holds one, or until
            `Result.save`.

        Raises:
            LoweringError: a program cannot be lowered, or its artifact computes something else.
        """
        check_as_opened(self._given, self._opened)
        check_as_handed_out(outcome.programs, outcome.handed_out)
        give_back(self.original.parameters())
        home = ScratchDirectory()
        original = self._given.to("cpu")

        def here(program: Program) -> Program:
            return original if program is self.original else program.to("cpu")

        with ScratchDirectory() as place:
            originals = Originals(original, self.backends, Path(place))
            deliveries = [
                deliver(
                    item,
                    here(outcome.programs[item.name]),
                    originals,
                    Path(home.name),
                    probe=self._probe,
                    metric=outcome.metric,
                    bench=bench,
                    sizes=bench if sizes is None else sizes,
                )
                for item in self.backends
            ]
        return self._result(outcome, [found.kept_by(home) for found in deliveries])

    @one_thread_at_a_time()
    def replay(self, stored: Manifest, directory: Path, registry: PassRegistry) -> Outcome:
        """Carry out stored plans on the original program instead of making them.

        Args:
            stored: the manifest that holds them.
            directory: where it lies, their tensors beside it.
            registry: where passes are found; plugins that made plans must be in it.

        Raises:
            GraphOptError: as `replaying.replay` does.
        """
        check_as_opened(self._given, self._opened)
        programs, plans = carry_out(self.original, stored, directory, registry)
        pipeline = Pipeline.parse(stored.pipeline, registry)
        report = self._new_report(pipeline, self.metric)
        report.notes.append(
            f"plans: they are those of {directory}; what each step costs was measured when they were made"
        )
        return Outcome(pipeline, programs, tuple(plans), report, self.metric)

    @one_thread_at_a_time()
    @gradients_recorded()
    @device_memory()
    def undelivered(self, outcome: Outcome) -> Result:
        """Return an outcome as a result without artifacts."""
        check_as_handed_out(outcome.programs, outcome.handed_out)
        return self._result(outcome, [])

    def _result(self, outcome: Outcome, deliveries: Sequence[Delivery]) -> Result:
        give_back(self.original.parameters())
        unchanged = self._given.copy() if self._lent else self._given  # who is given a program may train it
        programs = {
            target: unchanged if program is self.original else program.to(self._given.device)
            for target, program in outcome.programs.items()
        }
        given = [program for program in programs.values() if program is not self._given]
        own = own_tensors((program.graph_module for program in given), self._lent | lent_by(outcome.plans))
        for program in given:
            let_exports_read(program, own, self._given if program is unchanged else program)
        held = {target: program for target, program in programs.items() if program is outcome.programs[target]}
        outcome.handed_out.update({target: fingerprint(program.evaluated()) for target, program in held.items()})
        report = outcome.report.copy()
        for found in deliveries:
            report.add_artifact(found.row, found.baseline)
            report.facts[found.artifact.backend.name] = dict(found.artifact.facts)
            report.notes += found.notes
        return Result(
            original=self._given,
            programs=programs,
            plans=[plan for _, plan in outcome.plans],
            report=report,
            artifacts={found.artifact.backend.name: found.artifact for found in deliveries},
            pipeline=outcome.pipeline.text,
            seed=self.seed,
            plan_targets=[target for target, _ in outcome.plans],
            served=self.served,
        )

    def _new_report(self, pipeline: Pipeline, metric: Judge | None) -> Report:
        report = Report(self.name, str(pipeline), metric.name if metric else "", rows=[self._row(metric)])
        report.notes += [f"{note.subject}: {note.text}" for note in self.original.notes]
        report.notes += [f"data: {note}" for note in (self.samples.notes if self.samples else ())]
        report.notes += notes_on_types(self.original)
        if unbounded := self._probe.unbounded:
            of = batch_count(self._probe.batch)
            report.notes.append(f"data: outputs of the original are NaN or infinite for {unbounded} of {of} samples")
        return report

    def _row(self, metric: Judge | None) -> Row:
        if metric is self.metric and self._whole_row is not None:
            return self._whole_row
        recorder = Recorder(Report(self.name, ""), self.original, self._probe, metric, self._step_cache())
        row = dataclasses.replace(recorder.known(self.original), label="original")
        if metric is self.metric:
            self._whole_row = row
        return row

    def _step_cache(self) -> StepCache | None:
        return StepCache(self._memory, Store.of_user()) if self.cache else None

    @functools.cached_property
    def _probe(self) -> Probe:
        judging = self._split and (self._split.unseen or self._split.held_out or self._split.fitted)
        return Probe(self.original, probe_inputs(self.original, judging))

    @functools.cached_property
    def _sample_notes(self) -> list[str]:
        return [] if self._split is None else sample_notes(self.original, self._split.fitted)

    @functools.cached_property
    def _split(self) -> Split | None:
        """What passes may fit, what they choose by, and what reports are made of: one split for whatever runs."""
        return None if self.samples is None else split(self.samples, self.original)
