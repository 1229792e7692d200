"""Progress: a line for each thing done; of a loop that lasts, a bar on a terminal and a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from graphopt.errors import printable
from graphopt.ir.program import Program
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
            yield from _told(steps, label, total)
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        bar = Progress(*columns, console=Console(stderr=True), transient=True)
        task = bar.add_task(label, total=total)
        started, shown = time.monotonic(), False
        try:
            for step in steps:
                yield step
                bar.advance(task)
                if not shown and time.monotonic() - started > _PATIENCE:
                    bar.start()
                    shown = True
        finally:
            if shown:
                bar.stop()


def _say(seconds: float, text: str) -> None:
    print(f"{seconds:7.1f} s  {printable(text)}", file=sys.stderr, flush=True)


def _told(steps: Iterable[T], label: str, total: int | None) -> Iterator[T]:
    """Yield from `steps`, and say every half minute how many are done."""
    started = said = time.monotonic()
    for done, step in enumerate(steps):
        now = time.monotonic()
        if now - said >= _REST:
            said = now
            _say(now - started, f"{label}: {done}{'' if total is None else f' of {total}'}")
        yield step
