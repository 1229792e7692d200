"""Progress bars: only on a terminal, only for loops that last over two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")
_PATIENCE = 2.0  # seconds


class TerminalProgress:
    """Shows long loops on stderr with a bar and the time left."""

    def track(self, steps: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Yield from `steps`; the bar appears after two seconds."""
        if not sys.stderr.isatty():
            yield from steps
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        bar = Progress(*columns, console=Console(stderr=True), transient=True)
        if total is None and isinstance(steps, Sized):
            total = len(steps)
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
