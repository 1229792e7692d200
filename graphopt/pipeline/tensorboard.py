"""TensorBoard: what loops compute, losses among it, as events in a directory. The one adapter to `tensorboard`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from graphopt.errors import UsageError
from graphopt.pipeline.context import NoProgress, Progress

T = TypeVar("T")


class TensorBoard:
    """Progress that writes numbers for TensorBoard, and shows loops as another does.

    Args:
        directory: where events are written, `tensorboard --logdir` of it.
        progress: shows the loops.

    Raises:
        UsageError: tensorboard is not installed, or nothing can be written there.
    """

    def __init__(self, directory: str | Path, progress: Progress | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as err:
            raise UsageError("Events for TensorBoard need it: pip install 'graphopt[tensorboard]'.") from err
        try:
            self._writer: Any = SummaryWriter(str(directory))
        except OSError as err:
            raise UsageError(
                f"No events can be written to {directory}: {err.strerror}. Give another directory."
            ) from err
        self._progress = progress or NoProgress()

    def track(self, steps: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Yield from `steps`."""
        return self._progress.track(steps, label, total)

    def numbers(self, label: str, step: int, values: Mapping[str, float]) -> None:
        """Write numbers, and show them."""
        for name, value in values.items():
            self._writer.add_scalar(f"{label.replace(': ', '/')}/{name}", value, step)
        self._writer.flush()
        self._progress.numbers(label, step, values)
