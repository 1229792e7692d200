"""Progress: a line for each thing done; of a loop that lasts, a bar on a terminal and a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import TypeVar

from graphopt.errors import printable
from graphopt.ir.program import Program
from graphopt.pipeline.context import Progress
from graphopt.pipeline.hooks import Hook
from graphopt.pipeline.order import Step
from graphopt.pipeline.plan import Plan

T = TypeVar("T")
_PATIENCE = 2.0  # seconds before a terminal shows a bar
_REST = 30.0  # seconds between lines of a loop, where stderr goes to a file


class TerminalProgress(Hook):
    """Says on stderr what is done and how long it took, and shows long loops with a bar and the time left."""

    def __init__(self) -> None:
        """Start the clock."""
        self._since = time.monotonic()
        self._steps = False
        self._numbers: dict[str, dict[str, float]] = {}  # of loops by their labels

    def done(self, text: str) -> None:
        """Say what has been done since this was last called."""
        before, self._since = self._since, time.monotonic()
        _say(self._since - before, text)

    def before(self, step: Step, program: Program, target: str) -> None:
        """Say that the original is measured, before the first step."""
        if not self._steps:
            self.done("original: measured")
        self._steps = True

    def after(self, step: Step, before: Program, after: Program, plan: Plan, target: str) -> None:
        """Say what a step did; that its result has been measured counts."""
        self.done(f"{step.text}{f' for {target}' if target else ''}: {plan.summary()}")

    def track(self, steps: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Yield from `steps`; the bar appears after two seconds."""
        if total is None and isinstance(steps, Sized):
            total = len(steps)
        if not sys.stderr.isatty():
            yield from self._told(steps, label, total)
            return
        from rich import progress as rich
        from rich.console import Console

        done = rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeRemainingColumn()
        columns = rich.TextColumn("{task.description}"), *done
        bar = rich.Progress(*columns, console=Console(stderr=True), transient=True)
        task = bar.add_task(label, total=total)
        started, shown = time.monotonic(), False
        try:
            for step in steps:
                yield step
                bar.update(task, advance=1, description=self._with_numbers(label, label))
                if not shown and time.monotonic() - started > _PATIENCE:
                    bar.start()
                    shown = True
        finally:
            if shown:
                bar.stop()

    def numbers(self, label: str, step: int, values: Mapping[str, float]) -> None:
        """Show them with the loop from now on."""
        self._numbers.setdefault(label, {}).update(values)

    def _with_numbers(self, label: str, done: str) -> str:
        return ", ".join([done, *(f"{name} {value:.3g}" for name, value in self._numbers.get(label, {}).items())])

    def _told(self, steps: Iterable[T], label: str, total: int | None) -> Iterator[T]:
        """Yield from `steps`, and say every half minute how many are done."""
        started = said = time.monotonic()
        for done, step in enumerate(steps):
            now = time.monotonic()
            if now - said >= _REST:
                said = now
                of = "" if total is None else f" of {total}"
                _say(now - started, self._with_numbers(label, f"{label}: {done}{of}"))
            yield step


def logging_to(directory: Path | None, progress: TerminalProgress) -> Progress:
    """Return progress that also writes its numbers into a directory, where one is given."""
    if directory is None:
        return progress
    from graphopt.pipeline.tensorboard import TensorBoard

    return TensorBoard(directory, progress)


def _say(seconds: float, text: str) -> None:
    print(f"{seconds:7.1f} s  {printable(text)}", file=sys.stderr, flush=True)
