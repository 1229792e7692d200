"""sparsity24: zero two of every four weights along the inputs of a layer, where the runtime has kernels for that.

    w: 1.2 -0.1 0.3 -2.0        becomes        w: 1.3 0 0 -1.9

The pattern (N of M; two of four unless the target says otherwise) runs along the reduction axis: input features of a
linear layer, input channels of a convolution at each position of its kernel.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import fx

from graphopt.ir.graph import tensor_attribute
from graphopt.ir.plain_data import Json
from graphopt.ir.program import Program
from graphopt.measure.decibels import decibels
from graphopt.passes.layers.input_moments import InputMoments, gather
from graphopt.passes.layers.sparse_weights import SparseSite, find_sites, named, with_weights
from graphopt.passes.layers.weights import as_rows, as_weight
from graphopt.passes.sparsity.layers import at_the_ends, has_pattern, why_not
from graphopt.passes.sparsity.selection import fit, sparsify
from graphopt.pipeline.context import Context
from graphopt.pipeline.globs import check_globs
from graphopt.pipeline.pass_base import Pass
from graphopt.pipeline.plan import Plan, Refusal
from graphopt.statistics.calibration import read_batches
from graphopt.targets.description import SparseFormat

logger = logging.getLogger(__name__)

_BATCH = 32  # samples run at once


@dataclass(frozen=True, slots=True)
class Sparsity24Options:
    """Which weights go, and where.

    criterion: those the outputs miss least (sqnr), or the smallest (magnitude); none: sqnr with data.
    refit: with data, what stays takes over what goes, by least squares.
    nonzeros: how many of each group stay; none: what the target takes, two.
    group: inputs in a group; none: what the target takes, four.
    ends: also the layers that read the program's inputs and make its outputs.
    skip: weights left dense, as globs of names like `head.*`.
    samples: calibration samples used.
    force: also where the target has no kernel for it.
    """

    criterion: Literal["magnitude", "sqnr"] | None = None
    refit: bool = True
    nonzeros: Annotated[int, Field(ge=1)] | None = None
    group: Annotated[int, Field(ge=2, le=16)] | None = None
    ends: bool = False
    skip: tuple[str, ...] = ()
    samples: Annotated[int, Field(ge=1)] = 256
    force: bool = False

    def __post_init__(self) -> None:
        """Check that the pattern leaves something out."""
        if self.nonzeros is not None and self.nonzeros >= (4 if self.group is None else self.group):
            raise ValueError("nonzeros must be less than group")


@dataclass(frozen=True, kw_only=True)
class Sparsity24Plan(Plan):
    """The sparse weights, as tensors by the name of the weight.

    Attributes:
        layers: by the name of the weight: the criterion, whether it was refitted, how many inputs were looked at
            together ("block", None without data), the share of zeros, and the signal-to-noise ratio in dB, of the
            outputs with data (inputs of different blocks taken as uncorrelated), else of the weight (None where
            nothing changed).
    """

    layers: Mapping[str, Mapping[str, Json]] = field(default_factory=dict)


class Sparsity24(Pass[Sparsity24Options, Sparsity24Plan]):
    """Give linear layers and convolutions weights of which two of every four are zero. Lossy.

    With calibration data the weights that go are those that change the outputs least, and the others are refitted to
    the outputs; without it, those of least magnitude go, which the plan says. A layer that sees fewer than two samples
    (pixels, tokens) for each input is not refitted, which the plan says too. `int8` keeps the
    zeros, and so does all training that follows.

    Left dense, with the reason:

    1. everything, where the target has no kernel for such weights (`force` overrides it);
    2. inputs or outputs that are not aligned as the kernels need, depthwise and transposed convolutions;
    3. the layers that read the program's inputs and make its outputs, unless `ends` says otherwise;
    4. weights that are computed, stored as integers, shared with other operators, or named by `skip`;
    5. weights that have the pattern already, no elements, or NaN or infinite values.
    """

    name = "sparsity24"
    options_type = Sparsity24Options
    plan_type = Sparsity24Plan
    cached = True
    after = ("drop_blocks", "prune", "svd")
    reads_target = True

    def plan(self, program: Program, ctx: Context) -> Sparsity24Plan:
        """Choose and refit the weights of every layer that a sparse kernel takes.

        Raises:
            UsageError: a glob of `skip` matches no weight.
            DataError: `criterion=sqnr` and there is no data.
        """
        if self.options.criterion == "sqnr":
            ctx.need_samples(self.name, "to see which weights matter to the outputs (criterion=magnitude needs none)")
        form = self._form(ctx)
        gm = program.graph_module
        found, refusals = find_sites(gm)
        others = [refusal.site for refusal in refusals]
        check_globs("skip", self.options.skip, [site.weight_name for site in found], kind="weight", others=others)
        sites, dense = self._divide(found, form, ctx, gm)
        layers: dict[str, dict[str, Json]] = {}
        tensors: dict[str, torch.Tensor] = {}
        notes = self._without_data(sites, ctx)
        measured = self._with_moments(program, sites, form, ctx)
        for site, moments in ctx.progress.track(measured, "choosing weights", len(sites)):
            tensors[site.weight_name], layers[site.weight_name] = self._sparse(gm, site, moments, form)
            notes += self._not_refitted(site, moments)
        order = [site.weight_name for site in sites]
        plan = self.new_plan(
            sites=order,
            refusals=[*refusals, *dense, *notes],
            layers={name: layers[name] for name in order},
            tensors={name: tensors[name] for name in order},
        )
        logger.info("sparsity24: %s", plan.summary())
        return plan

    def apply(self, program: Program, plan: Sparsity24Plan) -> Program:
        """Put the sparse weights in the place of the dense ones.

        Raises:
            PassError: the plan was made for another program.
        """
        return with_weights(program, plan.tensors, self.name, sparse=plan.sites)

    def _form(self, ctx: Context) -> SparseFormat:
        """Return the pattern wanted: the target's, with what the options say instead."""
        known = ctx.target.sparsity if ctx.target is not None else None
        base = known or SparseFormat()
        nonzeros = base.nonzeros if self.options.nonzeros is None else self.options.nonzeros
        group = base.group if self.options.group is None else self.options.group
        return SparseFormat(nonzeros, group, base.inputs_multiple, base.outputs_multiple)

    def _divide(
        self, found: Sequence[SparseSite], form: SparseFormat, ctx: Context, gm: fx.GraphModule
    ) -> tuple[list[SparseSite], list[Refusal]]:
        """Return the sites that become sparse, and why the others do not."""
        no_kernel = self._no_kernel(form, ctx)
        ends = set() if self.options.ends else at_the_ends(gm)
        sites, refusals = [], []
        for site in found:
            reason = no_kernel or why_not(site, form, gm)
            if named(site, self.options.skip):
                reason = "named in skip", ""
            elif reason is None and any(call.node in ends for call in site.calls):
                reason = "it reads the program's input or makes its output (ends=yes includes it)", ""
            if reason:
                refusals.append(Refusal(site.weight_name, *reason))
            else:
                sites.append(site)
        return sites, refusals

    def _no_kernel(self, form: SparseFormat, ctx: Context) -> tuple[str, str] | None:
        """Return why the target cannot use the pattern, None if it can or that does not matter."""
        if self.options.force:
            return None
        target = ctx.need_target(self.name)
        if target.sparsity is None:
            return f"{target.name} has no kernel for sparse weights (force=yes zeroes them all the same)", ""
        if (target.sparsity.nonzeros, target.sparsity.group) != (form.nonzeros, form.group):
            takes = f"{target.sparsity.nonzeros}:{target.sparsity.group}"
            return f"{target.name} takes {takes}, not {form.nonzeros}:{form.group}", ""
        return None

    def _with_moments(
        self, program: Program, sites: Sequence[SparseSite], form: SparseFormat, ctx: Context
    ) -> Iterator[tuple[SparseSite, InputMoments | None]]:
        """Pair each site with the moments of its inputs where there is data and they are wanted."""
        if ctx.samples is None or not self._wants_data:
            yield from ((site, None) for site in sites)
        elif sites:
            batches = read_batches(program, ctx.samples, limit=self.options.samples, batch_size=_BATCH)
            yield from gather(program, sites, batches, form.group, ctx.progress)

    @property
    def _wants_data(self) -> bool:
        return self.options.refit or self.options.criterion != "magnitude"

    def _without_data(self, sites: Sequence[SparseSite], ctx: Context) -> list[Refusal]:
        """Say what there is no data for."""
        if not sites or ctx.samples is not None or not self._wants_data:
            return []
        chosen = "" if self.options.criterion == "magnitude" else "chosen by magnitude"
        left = "not refitted" if self.options.refit else ""
        return [Refusal("the program", f"{' and '.join(filter(None, (chosen, left)))}: there is no data")]

    def _not_refitted(self, site: SparseSite, moments: InputMoments | None) -> list[Refusal]:
        """Say that a layer has seen too little to be refitted."""
        if moments is None or not self.options.refit or _enough(moments):
            return []
        seen = f"{moments.rows} samples (pixels, tokens) for {moments.block} inputs, of {2 * moments.block} needed"
        return [Refusal(site.weight_name, f"made sparse, but not refitted: {seen}", "made sparse, but not refitted")]

    def _sparse(
        self, gm: fx.GraphModule, site: SparseSite, moments: InputMoments | None, form: SparseFormat
    ) -> tuple[torch.Tensor, dict[str, Json]]:
        """Return the sparse weight of a site and what the plan says about it."""
        call, stored = site.calls[0], tensor_attribute(gm, site.weight_name)
        rows = as_rows(call, stored).double()  # (groups, outputs, inputs)
        matrices = moments.matrices() if moments is not None and moments.rows else None
        by_moments = matrices is not None and self.options.criterion != "magnitude"
        refit = self.options.refit and moments is not None and _enough(moments)
        block = rows.shape[2] if moments is None else moments.block
        parts = torch.split(rows, block, 2)
        unknown: list[torch.Tensor | None] = [None] * len(rows)
        known = [unknown for _ in parts] if matrices is None else [list(of_block) for of_block in matrices]
        settled = [  # by block: (groups, outputs, inputs of the block)
            torch.stack([_settled(*pair, form, by_moments=by_moments, refit=refit) for pair in zip(*both, strict=True)])
            for both in zip(parts, known, strict=True)
        ]
        weight = as_weight(call, torch.cat(settled, 2), stored.dtype)
        final = as_rows(call, weight)
        assert has_pattern(final, form)
        return weight, {
            "criterion": "sqnr" if by_moments else "magnitude",
            "refit": refit,
            "block": None if matrices is None else block,
            "zeros": float((final == 0).double().mean()),
            "sqnr": _ratio(rows, final.double(), block, matrices),
        }


def _enough(moments: InputMoments) -> bool:
    """Whether refitting is safe: fewer samples than inputs say nothing about some directions, which it would spoil."""
    return moments.rows >= 2 * moments.block


def _settled(
    dense: torch.Tensor, moments: torch.Tensor | None, form: SparseFormat, *, by_moments: bool, refit: bool
) -> torch.Tensor:
    """Return the sparse weights of one group of outputs over one block of inputs."""
    sparse = sparsify(dense, moments, form, by_moments=by_moments, refit=refit)
    return fit(dense, sparse, moments) if refit and moments is not None else sparse


def _ratio(
    wanted: torch.Tensor, found: torch.Tensor, block: int, moments: Sequence[torch.Tensor] | None
) -> float | None:
    """Return the signal-to-noise ratio in dB of the outputs, of the weights where no moments are known."""
    noise, signal = (_power(rows, block, moments) for rows in (wanted - found, wanted))
    ratio = decibels(signal, noise)
    return ratio if math.isfinite(ratio) else None


def _power(rows: torch.Tensor, block: int, moments: Sequence[torch.Tensor] | None) -> float:
    parts = torch.split(rows, block, 2)
    images = parts if moments is None else [part @ matrix for part, matrix in zip(parts, moments, strict=True)]
    return sum(float((image * part).sum()) for image, part in zip(images, parts, strict=True))
