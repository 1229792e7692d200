"""Stopwatch: how long a program takes in its runtime relative to another, for passes that decide by it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from graphopt.files import ScratchDirectory
from graphopt.ir.contents import as_array
from graphopt.ir.program import Program
from graphopt.measure.bench import Spread, batch_of, time_in_turn
from graphopt.targets.backend import Backend


@dataclass(frozen=True)
class _Loaded:
    call: Callable[[], object]
    home: ScratchDirectory  # the runtime may map the file; it goes when this does


class Stopwatch:
    """Lowers programs with one backend and times them in turn: one sample per call, one thread.

    Process CPU time, because a pass should not decide by what else the machine was doing.
    """

    def __init__(self, backend: Backend, seconds: float = 1.0) -> None:
        """Prepare to measure; nothing is lowered yet.

        Args:
            backend: whose runtime executes on this machine.
            seconds: time to spend on one comparison, besides lowering.
        """
        self.backend = backend
        self._seconds = seconds
        self._loaded: weakref.WeakKeyDictionary[Program, _Loaded] = weakref.WeakKeyDictionary()

    def __call__(self, program: Program, reference: Program) -> Spread:
        """Return the time of `program` over that of `reference`, below 1 if it is faster.

        Raises:
            LoweringError: one of them cannot be lowered.
        """
        calls = [self._load(one) for one in (program, reference)]
        return time_in_turn(calls[0], calls[1], seconds=self._seconds).cpu_ratio

    def _load(self, program: Program) -> Callable[[], object]:
        if program not in self._loaded:
            home = ScratchDirectory()
            artifact = self.backend.lower(program, self.backend.path_in(Path(home.name), "timed"))
            session = artifact.session(threads=1)
            feed = batch_of(artifact.inputs, [*map(as_array, program.flat_examples())], 1)
            self._loaded[program] = _Loaded(lambda: session(*feed), home)
        return self._loaded[program].call
