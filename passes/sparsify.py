"""sparsify: single weights become zero, the smallest or those that outputs miss least, and stay so through training.

w: 1.2 -0.1 0.3 -2.0        becomes        w: 1.2 0 0 -2.0

magnitude    |w|
gradient     (E (w g)^2)^(1/2), what setting w to zero does to the loss, or to the outputs, to first order
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from graphopt.ir.finite import all_finite
from graphopt.ir.graph import tensor_attribute
from graphopt.ir.program import Program
from graphopt.ir.zeros import held_zeros
from graphopt.passes.layers.between_steps import recovered
from graphopt.passes.layers.directions import Purpose, directions
from graphopt.passes.layers.sparse_weights import find_sites, named, with_weights
from graphopt.pipeline.context import Context
from graphopt.pipeline.globs import check_globs
from graphopt.pipeline.pass_base import Pass
from graphopt.pipeline.plan import Plan, Refusal
from graphopt.statistics.calibration import no_batch

logger = logging.getLogger(__name__)

_RATIO, _SAMPLES, _EPOCHS = 0.5, 256, 1
_NO_KERNEL = "no kernel of ONNX Runtime or TensorRT is faster for it: single zeros make what is stored compress better"


@dataclass(frozen=True, slots=True)
class SparsifyOptions:
    """How many weights become zero, which, and in how many steps.

    ratio: share of the weights that are zero then, those that were so before among them; none: 0.5, or by a threshold.
    by: what goes first: small weights, or by gradients those that the outputs miss least, which needs data.
    threshold: weights smaller than this become zero, however many, in the place of a ratio.
    scope: whether every layer loses its share, or all together, whichever weights count least.
    steps: how often the choice is made, of more weights each time, with `recover` in between.
    epochs: of each recovery in between.
    samples: calibration samples used by gradients.
    skip: weights left dense, as globs of names like `head.*`.
    """

    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    by: Literal["magnitude", "gradient"] = "magnitude"
    threshold: Annotated[float, Field(gt=0)] | None = None
    scope: Literal["layer", "global"] = "layer"
    steps: Annotated[int, Field(ge=1)] = 1
    epochs: Annotated[int, Field(ge=0)] = _EPOCHS
    samples: Annotated[int, Field(ge=1)] = _SAMPLES
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what would change nothing."""
        given = {
            "ratio": self.ratio is not None,
            "by": self.by != "magnitude",
            "scope": self.scope != "layer",
            "steps": self.steps != 1,
        }
        if self.threshold is not None and (unread := next((name for name, one in given.items() if one), None)):
            raise ValueError(f"threshold is of magnitudes, weight by weight: it reads no `{unread}`")
        if self.samples != _SAMPLES and self.by != "gradient":
            raise ValueError("by=magnitude reads no `samples`; by=gradient does")
        if self.epochs != _EPOCHS and self.steps == 1:
            raise ValueError("steps=1 has nothing in between: `epochs` are of the recoveries there")


@dataclass(frozen=True, kw_only=True)
class SparsifyPlan(Plan):
    """Sites are the sparse weights; the payload holds them, and what training in between has changed besides.

    Attributes:
        zeros: share of zeros of each sparse weight.
    """

    zeros: Mapping[str, float] = field(default_factory=dict)


class Sparsify(Pass[SparsifyOptions, SparsifyPlan]):
    """Set single weights of linear layers and convolutions to zero: small ones, or those that count least. Lossy.

    `recover`, `qat` and every other training that follows keeps the zeros, and so does `int8`. With `steps` the share
    of zeros grows as 1 - (1 - t)^3 (Zhu and Gupta 2017, "To prune, or not to prune", equation 1) and the rest is
    recovered in between.

    No kernel of a target gains by it; what is stored compresses better.

    Left dense, with the reason: weights that are computed, stored as integers, shared with other operators, without
    elements or named by `skip`, and where they or their gradients are NaN; the largest weight of a layer always stays.
    """

    name = "sparsify"
    options_type = SparsifyOptions
    plan_type = SparsifyPlan
    cached = True
    after = ("drop_blocks", "prune", "svd")
    before = ("weights", "int8", "mixed", "qat", "half", "bfloat16")
    conflicts = ("codebook",)  # entries of a table keep no zeros

    def plan(self, program: Program, ctx: Context) -> SparsifyPlan:
        """Choose the weights that go.

        Raises:
            UsageError: a glob of `skip` matches no weight.
            DataError: `by=gradient` or several steps, and there is no data.
        """
        gm, refusals = program.graph_module, list[Refusal]()
        found, others = find_sites(gm)
        check_globs(
            "skip",
            self.options.skip,
            [site.weight_name for site in found],
            kind="weight",
            others=[refusal.site for refusal in others],
        )
        sites = []
        for site in found:
            weight = tensor_attribute(gm, site.weight_name)
            reason = "named in skip" if named(site, self.options.skip) else _why_not(weight)
            if reason:
                refusals.append(Refusal(site.weight_name, reason))
            else:
                sites.append(site)
        names = [site.weight_name for site in sites]
        result, unknown = self._sparse(program, names, ctx) if names else (program, set[str]())
        before, after = program.state_dict(), result.state_dict()
        changed = {name: one for name, one in after.items() if not torch.equal(one, before[name])}
        held = held_zeros(gm)
        kept = {name: after[name] for name in names if name in changed or (name not in held and _zeros(after[name]))}
        for name in names:
            if name not in kept:
                reason = "as many of its weights are zero already" if name in held else "none of its weights is chosen"
                refusals.append(Refusal(name, "its gradients are not finite" if name in unknown else reason))
        plan = self.new_plan(
            sites=kept,
            refusals=[*others, *refusals],
            tensors={name: one.detach() for name, one in changed.items()},
            zeros={name: _zeros(one) for name, one in kept.items()},
            notes=(_said(kept),) if kept else (),
        )
        logger.info("sparsify: %s", plan.summary())
        return plan

    def apply(self, program: Program, plan: SparsifyPlan) -> Program:
        """Put the sparse weights in the place of the dense ones.

        Raises:
            PassError: the plan was made for another program.
        """
        return with_weights(program, plan.tensors, self.name, sparse=plan.sites)

    def _sparse(self, program: Program, names: Sequence[str], ctx: Context) -> tuple[Program, set[str]]:
        """Return a program with the zeros of all steps, and the weights that nothing tells what they count."""
        if self.options.steps > 1:
            ctx.need_samples(self.name, "to recover on between steps (steps=1 needs none)")
            ctx.need_held_out(self.name)
        unknown = set[str]()
        for step in range(1, self.options.steps + 1):
            every = self._scores(program, names, ctx)
            scores = {name: score for name, score in every.items() if all_finite(score)}
            unknown |= every.keys() - scores.keys()
            if not scores:
                break
            masks = self._masks(scores, (self.options.ratio or _RATIO) * (1 - (1 - step / self.options.steps) ** 3))
            gm = program.graph_module
            weights = {name: tensor_attribute(gm, name).detach() * kept for name, kept in masks.items()}
            program = with_weights(program, weights, self.name, sparse=weights)
            if step < self.options.steps:
                program, _ = recovered(program, self.options.epochs, ctx, step)
        return program, unknown

    def _scores(self, program: Program, names: Sequence[str], ctx: Context) -> dict[str, Tensor]:
        """Return what each weight counts."""
        gm = program.graph_module
        weights = {name: tensor_attribute(gm, name).detach() for name in names}
        if self.options.by == "magnitude":
            return {name: weight.abs() for name, weight in weights.items()}
        samples = ctx.need_samples(self.name, "to see which weights count (by=magnitude needs none)")
        asked = Purpose(self.name, "by=gradient", "by=magnitude")
        squares = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
        seen = False
        for along in directions(program, gm, names, samples, self.options.samples, ctx, asked):
            seen = True
            for name, weight in weights.items():
                squares[name] += (weight * along[name]).square()
        if not seen:
            raise no_batch(program, " for by=gradient")
        return squares

    def _masks(self, scores: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
        """Return which weights stay, of a layer the one that counts most in any case."""
        if self.options.threshold is not None:
            kept = {name: score >= self.options.threshold for name, score in scores.items()}
        elif self.options.scope == "layer":
            kept = {name: _largest([score], ratio)[0] for name, score in scores.items()}
        else:
            kept = dict(zip(scores, _largest(list(scores.values()), ratio), strict=True))
        for name, score in scores.items():
            kept[name].view(-1)[score.argmax()] = True
        return kept


def _largest(scores: Sequence[Tensor], ratio: float) -> list[Tensor]:
    """Return which of all scores are not among the share of the smallest; of equals the first go."""
    every = torch.cat([score.flatten() for score in scores])
    kept = torch.ones(len(every), dtype=torch.bool, device=every.device)
    kept[every.sort(stable=True).indices[: round(ratio * len(every))]] = False
    parts = torch.split(kept, [score.numel() for score in scores])
    return [part.reshape(score.shape) for part, score in zip(parts, scores, strict=True)]


def _why_not(weight: Tensor) -> str:
    if not weight.numel():
        return "its weight has no elements"
    return "" if all_finite(weight) else "its weight holds NaN or infinite values"


def _zeros(weight: Tensor) -> float:
    return float((weight == 0).double().mean())


def _said(sparse: Mapping[str, Tensor]) -> str:
    count = sum(weight.numel() for weight in sparse.values())
    zeros = sum(int((weight == 0).sum()) for weight in sparse.values())
    return f"{zeros / count:.0%} of {count} weights are zero; {_NO_KERNEL}"
