"""mixed: how many bits each weight gets, by what each costs in accuracy and saves in bytes or time.

    minimize    sum of bytes (or time) of all weights, each in one form        float32, half, int8, 8, 4 .. bits stored
    such that   sum of the noise that each brings into the outputs alone <= budget

The budget is the largest whose program, made and measured, stays within what is asked: `max_drop` points of the metric,
or `min_sqnr` dB. With `min_speedup` or `bytes` it is the other way round: the least noise that saves so much.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import ChainMap, Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from graphopt.data.batches import whole_batches
from graphopt.ir.plain_data import Json
from graphopt.ir.program import Program
from graphopt.measure.budget import Budget
from graphopt.measure.decibels import decibels
from graphopt.passes.layers.skipping import AS_ASKED, as_asked, check_not_folded
from graphopt.passes.mixing.forms import FLOAT, Form, FormSite, compose, find_sites, stored_pass
from graphopt.passes.mixing.goal import Candidate, Goal
from graphopt.passes.mixing.latency import time_saved
from graphopt.passes.mixing.search import FormSearch
from graphopt.pipeline.context import Context
from graphopt.pipeline.pass_base import Pass
from graphopt.pipeline.plan import Plan, Refusal
from graphopt.statistics.sensitivity import sensitivities

logger = logging.getLogger(__name__)
_TOGETHER = 4  # samples whose values are held at once
_DEFAULT_SQNR = 25.0
_RUNS = 12


@dataclass(frozen=True, slots=True)
class MixedOptions:
    """What has to be met: a limit on accuracy, on cost, or on both; none: `min_sqnr=25`.

    max_drop: points of the metric that may be lost, on half of the labelled data.
    min_sqnr: dB that outputs stay within, instead; needs no labels.
    min_speedup: how many times as fast it is to be, by timing in the target's runtime.
    bytes: weights that may be left, as a share of the original's below 1, or in bytes.
    minimize: what is saved within a limit on accuracy; time is measured in the target's runtime.
    forms: what a weight may become; it may always stay float32.
    samples: calibration samples that sensitivity is measured on.
    runs: choices that are run to find the budget of noise, at most.
    trials: choices that are made into programs and measured, at most, besides the cheapest and all float32.
    skip: what stays float32, as globs of weights, calls or modules.
    """

    max_drop: Annotated[float, Field(ge=0)] | None = None
    min_sqnr: Annotated[float, Field(gt=0)] | None = None
    min_speedup: Annotated[float, Field(gt=1)] | None = None
    bytes: Annotated[float, Field(gt=0)] | None = None
    minimize: Literal["bytes", "latency"] = "bytes"
    forms: tuple[Form, ...] = ("weights4", "weights8", "int8")
    samples: Annotated[int, Field(ge=1)] = 32
    runs: Annotated[int, Field(ge=1)] = _RUNS
    trials: Annotated[int, Field(ge=1)] = 4
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what asks for two things at once."""
        if self.max_drop is not None and self.min_sqnr is not None:
            raise ValueError("`max_drop` and `min_sqnr` both limit what is lost; give one of them")
        if not self.forms:
            raise ValueError("forms names none")
        limited = next((name for name in ("bytes", "min_speedup") if getattr(self, name) is not None), None)
        if limited and (self.minimize != "bytes" or self.runs != _RUNS):
            raise ValueError(f"with `{limited}` the least noise is looked for: no `minimize`, no `runs`")
        Budget.of(self)

    @property
    def fill_up(self) -> bool:
        """Whether depthwise layers may get more channels: faster so, and more bytes than are counted by site."""
        return self.bytes is None and (self.minimize == "latency" or self.min_speedup is not None)


@dataclass(frozen=True, kw_only=True)
class MixedPlan(Plan):
    """Which form each weight has, and the plans of the passes that bring it there; their tensors are named by number.

    Attributes:
        forms: by site its form, `float32` where none pays.
        sensitivity: by site and form the dB that the outputs have with that alone; null where they are not changed.
        steps: plans of `int8`, `weights` and others, in order, as they store themselves.
    """

    forms: Mapping[str, str] = field(default_factory=dict)
    sensitivity: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    steps: tuple[Mapping[str, Json], ...] = ()

    def summary(self) -> str:
        """Return "14 x int8, 3 x weights4, 2 x float32"."""
        counts = Counter(self.forms.values()).most_common()
        return ", ".join(f"{count} x {form}" for form, count in counts) or super().summary()


class Mixed(Pass[MixedOptions, MixedPlan]):
    """Choose for each weight whether it is float32, 16, 8 or fewer bits, within limits on accuracy, time or bytes.

    1. Every form is what a pass makes of a site: `int8`, `weights:bits=..`, `half`; what none takes stays float32.
    2. What a form of a site costs is measured by forward passes with it alone, on calibration samples.
    3. What it saves is counted in bytes, or timed in the target's runtime: all in that form against all but it.
    4. An integer program chooses; what came of it is made, and measured on samples that nothing was fitted to.
    5. Where no choice meets a limit, the best one is made, and the run fails as at a gate.

    Operators without weights follow the layers around them, as in `int8`; channels are filled up for time alone.
    """

    name = "mixed"
    options_type = MixedOptions
    plan_type = MixedPlan
    cached = True
    needs = ("folded",)
    produces = ("quantized",)
    after = ("drop_blocks", "prune", "svd", "recover", "sparsity24", "equalize")
    conflicts = ("int8", "weights", "codebook", "half", "bfloat16")
    reads_target = True
    has_goal = True

    @property
    def chooses_by_metric(self) -> bool:  # type: ignore[override]
        """Whether the metric limits what is lost."""
        return self.options.max_drop is not None

    def plan(self, program: Program, ctx: Context) -> MixedPlan:
        """Measure what each form costs and saves, choose, and make what was chosen.

        Raises:
            UsageError: a glob of `skip` names nothing.
            DataError: there are no samples, or no labelled ones for `max_drop`.
            PassError: time is to be measured, and the target does not run here.
        """
        options = self.options
        if all(limit is None for limit in (options.max_drop, options.min_sqnr, options.min_speedup, options.bytes)):
            options = dataclasses.replace(options, min_sqnr=_DEFAULT_SQNR)
        ctx.need_samples(self.name, "to see how sensitive each weight is")
        check_not_folded(options.skip, program, ctx)
        goal = Goal(options, program, ctx, self.name)
        sites = find_sites(program, ctx, options.forms, options.skip)
        self._weigh(program, sites, ctx)
        measured: dict[str, Json] = {}
        if options.minimize == "latency" or options.min_speedup is not None:
            measured |= self._time(program, sites, ctx)
        search = FormSearch(sites, goal, options.runs, options.trials)
        limits = goal.to_save()
        best = search.closest(limits) if limits else search.least(options.minimize)
        for number, candidate in enumerate(search.made.values()):
            found = {unit: value if math.isfinite(value) else None for unit, value in candidate.measured.items()}
            measured[f"trial {number + 1}"] = found
        steps, _ = compose(program, ctx, sites, best.chosen, fill_up=options.fill_up)
        plan = self._plan_of(best, steps, sites, "it is met without" if limits else "others take what may be lost")
        plan = dataclasses.replace(
            plan,
            measured=measured,
            unmet=tuple(goal.missed(best)),
            notes=(f"weights are {plan.summary()}", *search.notes, *(note for step in steps for note in step.notes)),
        )
        logger.info("mixed: %s", plan.summary())
        return plan

    def apply(self, program: Program, plan: MixedPlan) -> Program:
        """Carry out the plans it is made of, one after the other.

        Raises:
            PassError: one of them is of no pass that makes a form.
        """
        for number, step in enumerate(plan.steps):
            made = stored_pass(step)
            prefix = f"{number}/"
            tensors = {name.removeprefix(prefix): one for name, one in plan.tensors.items() if name.startswith(prefix)}
            stored = made.plan_type.from_json(step, tensors)
            program = made.apply(program, stored) if stored.sites else program
        return program

    def _weigh(self, program: Program, sites: Sequence[FormSite], ctx: Context) -> None:
        """Measure the noise of every form of every site; a form whose outputs are not finite is none."""
        samples = ctx.need_samples(self.name, "to see how sensitive each weight is")
        batches = whole_batches(samples, _TOGETHER, self.options.samples, takes=program.takes)
        pairs = [(site, form) for site in sites for form in site.knobs if not site.skipped]

        def measure() -> dict[str, Json]:
            found = sensitivities(program, batches, [site.knobs[form] for site, form in pairs], ctx.progress)
            return {"noise": [noise if math.isfinite(noise) else None for noise in found]}

        found = ctx.remember("sensitivity", measure)["noise"]
        assert isinstance(found, list)
        for (site, form), noise in zip(pairs, found, strict=True):
            if isinstance(noise, int | float):
                site.noise[form] = noise

    def _time(self, program: Program, sites: Sequence[FormSite], ctx: Context) -> dict[str, Json]:
        timer = ctx.need_timer(self.name)
        measured: dict[str, Json] = {}
        for form in self.options.forms:
            saved, found = time_saved(program, ctx, sites, form, timer, fill_up=self.options.fill_up)
            measured |= found
            for site in sites:
                if site.name in saved:
                    saves = {**site.knobs[form].saves, "latency": saved[site.name]}
                    site.knobs[form] = dataclasses.replace(site.knobs[form], saves=saves)
        return measured

    def _plan_of(self, best: Candidate, steps: Sequence[Plan], sites: Sequence[FormSite], why: str) -> MixedPlan:
        """Return a plan that holds others; what they leave alone because it is to have another form is not said."""
        chosen = best.chosen
        floats = [site for site in sites if chosen[site.name] == FLOAT]
        called = {name for site in sites for knob in site.knobs.values() for name in (knob.site, *knob.skip)}
        refusals = [refusal for plan in steps for refusal in plan.refusals if refusal.site not in called]
        refusals = [refusal for refusal in refusals if refusal.kind != AS_ASKED]  # asked by this pass
        tensors = [{f"{number}/{name}": one for name, one in plan.tensors.items()} for number, plan in enumerate(steps)]
        return self.new_plan(
            sites=[site.name for site in sites if chosen[site.name] != FLOAT],
            refusals=[*dict.fromkeys(refusals), *(Refusal(site.name, *_why_float(site, why)) for site in floats)],
            tensors=dict(ChainMap(*tensors)),
            forms=dict(chosen),
            sensitivity={site.name: _alone(site) for site in sites},
            steps=tuple(plan.to_json() for plan in steps),
        )


def _why_float(site: FormSite, why: str) -> tuple[str, str]:
    if site.skipped:
        return as_asked(site.skipped)
    ratios = {form: math.inf if ratio is None else ratio for form, ratio in _alone(site).items()}
    said = [f"{form} alone leaves the outputs {ratio:.0f} dB" for form, ratio in ratios.items()]
    if not said:
        return "every form makes outputs infinite or NaN", ""
    return f"{why}; {', '.join(said)}", why


def _alone(site: FormSite) -> dict[str, float | None]:
    """Return by form the dB that the outputs have with that alone, None where they are not changed."""
    noises = {form: noise for form, noise in site.noise.items() if form != FLOAT}
    return {form: decibels(1.0, noise) if noise else None for form, noise in noises.items()}
