"""Hooks around a pass: printing, dumping and checking are clients of these, not code in the runner."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphopt.ir.program import Program
    from graphopt.pipeline.order import Step
    from graphopt.pipeline.plan import Plan


class Hook:
    """Does nothing; override what you need.

    `target` is the name of the target a step runs for, "" before the pipeline forks.
    """

    def before(self, step: Step, program: Program, target: str) -> None:
        """Called before a step plans."""

    def planned(self, step: Step, plan: Plan, target: str) -> None:
        """Called when a step has planned and before it applies."""

    def after(self, step: Step, before: Program, after: Program, plan: Plan, target: str) -> None:
        """Called when a step's result has passed the invariants."""


@dataclass
class Dump(Hook):
    """Write the graph after every step as `001_fold.py`, numbered, sorted, diffable."""

    directory: Path
    count: int = 0

    def after(self, step: Step, before: Program, after: Program, plan: Plan, target: str) -> None:
        """Write one file."""
        from graphopt.files import replacing

        self.count += 1
        name = "_".join(part for part in (f"{self.count:03d}", step.name, target) if part)
        with replacing(self.directory / f"{name}.py") as temporary:
            temporary.write_text(after.graph_module.print_readable(print_output=False))


class FullCheck(Hook):
    """`--check full`: what is too slow to run always. Exports again after every pass, so the culprit is named."""

    def after(self, step: Step, before: Program, after: Program, plan: Plan, target: str) -> None:
        """Export the result; run the pass's own proof where it ships one."""
        from graphopt.pipeline.contract import called

        after.export()
        with called(step.instance, "prove what it did"):
            step.instance.prove(before, after, plan)
