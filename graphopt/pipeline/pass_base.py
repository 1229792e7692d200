"""Pass: decide, then do.

    plan(program, ctx) -> Plan          # which channels, which rank, which scales, what was refused and why
    apply(program, plan) -> Program     # a deterministic rewrite, a function of its two arguments alone

A pass in full:

    @dataclass(frozen=True, slots=True)
    class Options:
        floor: Annotated[float, Field(ge=0)] = 1e-3  # smaller weights become 0

    class Threshold(Pass[Options, Plan]):
        '''Set weights whose magnitude is below `floor` to zero.'''

        name = "threshold"

        def plan(self, program, ctx):
            return self.new_plan(sites=[name for name, p in program.graph_module.named_parameters() if p.dim() > 1])

        def apply(self, program, plan):
            program = program.copy()
            editor = Editor(program.graph_module, self.name)
            for name in plan.sites:
                weight = tensor_attribute(program.graph_module, name)
                editor.put(name, weight * (weight.abs() >= self.options.floor), trainable=True)
            return program.with_graph(editor.finish())
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from graphopt.ir.program import Program
from graphopt.pipeline.context import Context
from graphopt.pipeline.knobs import Knob
from graphopt.pipeline.plan import Plan, Refusal
from graphopt.targets.description import TargetDescription


@dataclass(frozen=True, slots=True)
class NoOptions:
    """Options of a pass that has none."""


OptionsT = TypeVar("OptionsT")
PlanT = TypeVar("PlanT", bound=Plan)


class Pass(ABC, Generic[OptionsT, PlanT]):
    """One rewrite of a program. Subclass it, set the class attributes, write `plan` and `apply`.

    Attributes:
        name: how pipelines name it.
        options_type: a frozen dataclass; field types may carry pydantic constraints (`Annotated[float, Field(ge=0)]`).
        plan_type: `Plan` or a subclass with more JSON fields.
        tolerance: largest relative output error an exact pass may cause in the program's own precision; None marks
            a lossy pass, whose error is measured and reported.
        needs: properties that must hold before it ("folded"); a pass that produces a missing one is inserted.
        produces: properties that hold after it.
        invalidates: properties that no longer hold after it, so that a later need of them is met anew.
        after: passes that must stand before it when both are in a pipeline.
        before: passes that must stand behind it when both are in a pipeline.
        conflicts: passes that cannot be in one pipeline with it.
        reads_target: whether its plan depends on the target description; with several targets the pipeline forks here.
            An instance may decide by its options.
        reads_floating: whether it asks the context for the program before weights were stored as integers.
        chooses_by_metric: whether it asks the context's metric, of half of the labelled data; reports then take the
            other half. An instance may decide by its options.
        has_goal: whether its plan may say that what was asked for is not reached (`Plan.unmet`).
        changes_outputs: whether it may add or remove program outputs.
        cached: whether its plans may be kept for later runs. It says that `plan` and `apply` read nothing but their
            arguments, the options, and their source with what that imports: no file, no environment, no variable that
            changes. A subclass says it anew.
    """

    name: ClassVar[str]
    options_type: ClassVar[type[Any]] = NoOptions
    plan_type: ClassVar[type[Plan]] = Plan
    tolerance: ClassVar[float | None] = None
    needs: ClassVar[tuple[str, ...]] = ()
    produces: ClassVar[tuple[str, ...]] = ()
    invalidates: ClassVar[tuple[str, ...]] = ()
    after: ClassVar[tuple[str, ...]] = ()
    before: ClassVar[tuple[str, ...]] = ()
    conflicts: ClassVar[tuple[str, ...]] = ()
    reads_target: bool = False
    reads_floating: ClassVar[bool] = False
    chooses_by_metric: bool = False
    has_goal: ClassVar[bool] = False
    changes_outputs: ClassVar[bool] = False
    cached: ClassVar[bool] = False

    def __init__(self, options: OptionsT | None = None) -> None:
        self.options: OptionsT = self.options_type() if options is None else options

    def accepts(self, target: TargetDescription) -> None:
        """Look at a target before anything runs: what is not for it fails here.

        Raises:
            LoweringError: it says why, and what to do instead.
        """

    @abstractmethod
    def plan(self, program: Program, ctx: Context) -> PlanT:
        """Decide what to rewrite. Must not change `program`.

        Raises:
            PassError: the options cannot be met on this program at all.
            DataError: data is needed and missing, or does not fit.
        """

    @abstractmethod
    def apply(self, program: Program, plan: PlanT) -> Program:
        """Return a new program with the plan carried out. Depends on its two arguments alone."""

    def knobs(self, program: Program, ctx: Context) -> Sequence[Knob]:
        """List the sites that it would rewrite, for whoever decides site by site; none: it can only be left out whole.

        Options need a field `skip` that takes the names which knobs give.
        """
        return ()

    def prove(self, before: Program, after: Program, plan: PlanT) -> None:
        """Check more than is affordable on every run (`--check full`). Passes that can prove more override it.

        Raises:
            VerifyError: the rewrite does not mean what the pass claims.
        """

    def new_plan(self, *, sites: Iterable[str], refusals: Iterable[Refusal] = (), **fields: Any) -> PlanT:
        """Build this pass's plan with its name and options filled in."""
        return self.plan_type(  # type: ignore[return-value]
            pass_name=self.name,
            options=dataclasses.asdict(self.options),  # type: ignore[call-overload]
            sites=tuple(sites),
            refusals=tuple(refusals),
            **fields,
        )
