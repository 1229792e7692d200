"""weights: stores weights as integers of few bits, a scale for each block of a row; what is computed stays float.

    linear(x, w, b)    ->    linear(x, (unpack(bytes) - zero) * scale, b)        32 weights share scale and zero

For size, and for speed where reading weights takes longer than multiplying them: small batches, wide layers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from graphopt.ir.editor import Editor
from graphopt.ir.program import Program
from graphopt.passes.layers.gptq import round_in_order
from graphopt.passes.layers.matrix_sites import MatrixSite, check_skip, find_sites
from graphopt.passes.layers.skipping import check_not_folded
from graphopt.passes.weight_only.awq import input_scales, norm_of
from graphopt.passes.weight_only.blocks import block_size, to_integers
from graphopt.passes.weight_only.forms import form_of
from graphopt.passes.weight_only.knobs import knobs_of
from graphopt.passes.weight_only.plan import InputRecord, WeightsPlan, scaling_name
from graphopt.passes.weight_only.rewrite import MatrixRewriter
from graphopt.passes.weight_only.rounding import DataFree, choose_scales
from graphopt.passes.weight_only.storing import StoredMatrix, spread_sqnr, store
from graphopt.pipeline.context import Context
from graphopt.pipeline.knobs import Knob
from graphopt.pipeline.pass_base import Pass
from graphopt.pipeline.plan import Refusal
from graphopt.quantization.formats import IntegerFormat
from graphopt.statistics.covariance import WIDEST, Covariance, gather_covariances

logger = logging.getLogger(__name__)

_LEAST_SQNR = {8: 30.0, 4: 12.0, 3: 8.0, 2: 4.0}  # dB of an embedding table; rows of a normal distribution have 46 to 9
_SAMPLES, _DAMPING = 256, 0.01


@dataclass(frozen=True, slots=True)
class WeightsOptions:
    """How weights are stored, and which.

    bits: of a weight: 8, 4, 3 (stored in 4) or 2.
    block: weights of a row that share a scale; 0: all of them.
    symmetric: whether all blocks have the same zero point; none: where the target takes no other.
    method: how weights are rounded; gptq and awq need data.
    tables: embedding tables too.
    samples: calibration samples used.
    damping: of gptq, as a share of the mean squared input.
    skip: what is left float, as globs of module paths, weights or nodes.
    """

    bits: int = 4
    block: Annotated[int, Field(ge=0)] = 32
    symmetric: bool | None = None
    method: Literal["rtn", "mse", "hqq", "gptq", "awq"] = "mse"
    tables: bool = True
    samples: Annotated[int, Field(ge=1)] = 256
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the bits, and refuse what would change nothing."""
        if self.bits not in _LEAST_SQNR:
            raise ValueError("bits must be 8, 4, 3 or 2")
        if self.damping != _DAMPING and self.method != "gptq":
            raise ValueError(f"method={self.method} reads no `damping`; method=gptq does")
        if self.samples != _SAMPLES and self.method not in ("gptq", "awq"):
            raise ValueError(f"method={self.method} reads no `samples`; method=gptq and method=awq do")


class Weights(Pass[WeightsOptions, WeightsPlan]):
    """Store the weights of products and embedding tables as 8, 4, 3 or 2 bits, to be multiplied in float. Lossy.

    1. `linear`, `addmm`, `mm`, `matmul` with a stored matrix, in either layout; one that several share is stored once.
    2. Embedding tables, rows of which become float when they are read, and products tied to them.
    3. `rtn` keeps every weight in range, `mse` has the least squared error, `hqq` leaves outliers out of it; with data
       `gptq` lets what is not rounded yet make up for what is, and `awq` scales large inputs down before.

    Left float, with the reason: what the target has no kernel for (convolutions, recurrent layers, a number of bits, a
    size of blocks), weights that are computed, no float32, NaN, written to or read by others, layers in regions of a
    graph, what would not become smaller, tables that would change too much, what `skip` names.
    """

    name = "weights"
    options_type = WeightsOptions
    plan_type = WeightsPlan
    cached = True
    needs = ("folded",)
    produces = ("quantized",)
    after = ("drop_blocks", "prune", "svd", "recover", "sparsity24")
    before = ("int8", "half", "bfloat16")
    reads_target = True

    def plan(self, program: Program, ctx: Context) -> WeightsPlan:
        """Round every weight that the target reads as integers.

        Raises:
            UsageError: a glob of `skip` names nothing.
            DataError: `gptq` or `awq`, and there is no data.
        """
        target, gm = ctx.need_target(self.name), program.graph_module
        if self.options.method in ("gptq", "awq"):
            ctx.need_samples(self.name, f"to see what weights are multiplied with (method={self.options.method})")
        found, refusals = find_sites(gm)
        check_not_folded(self.options.skip, program, ctx)
        check_skip(self.options.skip, found, gm)
        forms: dict[MatrixSite, IntegerFormat] = {}
        for site in found:
            form = form_of(site, gm, target, self.options)
            if isinstance(form, Refusal):
                refusals.append(form)
            else:
                forms[site] = form
        work = _Work(gm, self.options)
        if self.options.method in ("gptq", "awq"):
            self._with_data(program, forms, work, ctx)
        left = [site for site in forms if site not in work.done]
        for site in ctx.progress.track(left, "rounding", len(left)):
            work.round(site, forms[site], self._without_data)
        stored = {site.weight_name: work.done[site] for site in forms if site in work.done}
        plan = self.new_plan(
            sites=list(stored),
            refusals=[*refusals, *work.notes],
            tensors={**work.factors, **_tensors(stored.values())},
            weights={name: one.record for name, one in stored.items()},
            inputs=tuple(work.inputs),
        )
        logger.info("weights: %s", plan.summary())
        return plan

    def apply(self, program: Program, plan: WeightsPlan) -> Program:
        """Let every layer read the stored integers."""
        program = program.copy()
        editor = Editor(program.graph_module, self.name)
        MatrixRewriter(editor, plan).run()
        return program.with_graph(editor.finish())

    def knobs(self, program: Program, ctx: Context) -> list[Knob]:
        """List what it does to each weight, but where it changes what weights are multiplied with (awq)."""
        plan = self.plan(program, ctx)
        return [] if plan.inputs else knobs_of(program, plan)

    @property
    def _without_data(self) -> DataFree:
        """Return how weights are rounded that nothing is known of but themselves."""
        method = self.options.method
        return "mse" if method == "gptq" or method == "awq" else method

    def _with_data(
        self, program: Program, forms: Mapping[MatrixSite, IntegerFormat], work: _Work, ctx: Context
    ) -> None:
        """Round every weight whose inputs can be looked at, value by value."""
        by_value: dict[str, list[MatrixSite]] = {}
        for site in forms:
            reason = _why_without_data(site)
            if not reason:
                by_value.setdefault(site.calls[0].input.name, []).append(site)
            elif site.calls:
                text = f"rounded by {self._without_data}: {reason}"
                work.notes.append(Refusal(site.weight_name, text, "rounded without regard to the data"))
        wanted = [
            (name, Covariance(sites[0].calls[0].input_axis), sites[0].calls[0].in_features)
            for name, sites in by_value.items()
        ]
        for name, covariance in gather_covariances(ctx, program, self.name, wanted, samples=self.options.samples):
            moments = covariance.about_zero().cpu()
            if self.options.method == "awq":
                work.scale_inputs(name, [site for site in by_value[name] if len(site.calls) == 1], forms, moments)
            for site in by_value[name]:
                work.round(site, forms[site], self._without_data, moments)


class _Work:
    """Weights rounded so far."""

    def __init__(self, gm: fx.GraphModule, options: WeightsOptions) -> None:
        self._gm = gm
        self._options = options
        self._divisors: dict[MatrixSite, Tensor] = {}
        self.done: dict[MatrixSite, StoredMatrix] = {}
        self.notes: list[Refusal] = []
        self.inputs: list[InputRecord] = []
        self.factors: dict[str, Tensor] = {}

    def round(self, site: MatrixSite, form: IntegerFormat, method: DataFree, moments: Tensor | None = None) -> None:
        """Round one weight, unless it is a table that would change too much.

        Args:
            site: the weight.
            form: integers to store.
            method: how scales are chosen.
            moments: E[x x^T] of its input, where that counts.
        """
        matrix, called = site.rows(self._gm).cpu(), str(method)
        if site in self._divisors:
            divisor = self._divisors[site]
            matrix, called = matrix * divisor, "awq"
            moments = None if moments is None else moments / torch.outer(divisor, divisor).double()
        scales = choose_scales(matrix, form, method)
        if self._options.method == "gptq" and moments is not None:
            blocks = torch.arange(matrix.shape[1]) // block_size(form, matrix.shape[1])  # of each column
            scale, zero = scales.scale[:, blocks], scales.zero[:, blocks]
            integers = round_in_order(matrix, scale, zero, form, moments, self._options.damping)
            called = "gptq"
        else:
            integers = to_integers(matrix, scales, form)
        if site.reads and (ratio := spread_sqnr(matrix, integers, scales, form)) < _LEAST_SQNR[form.bits]:
            text = f"{form.bits} bits leave the table {ratio:.0f} dB, {_LEAST_SQNR[form.bits]:.0f} are wanted"
            self.notes.append(Refusal(site.weight_name, text, f"{form.bits} bits are too few for a table"))
            return
        self.done[site] = store(site, matrix, integers, scales, form, method=called, moments=moments)

    def scale_inputs(
        self, value: str, sites: Sequence[MatrixSite], forms: Mapping[MatrixSite, IntegerFormat], moments: Tensor
    ) -> None:
        """Choose what the features of a value are divided by, for the layers that alone read their weights."""
        matrices = [(site.rows(self._gm).cpu(), forms[site]) for site in sites]
        divisor = input_scales(matrices, moments) if matrices else None
        if divisor is None:
            return
        nodes = [site.calls[0].node for site in sites]
        norm = norm_of(sites[0].calls[0].input, nodes, self._gm)
        self.inputs.append(InputRecord(value=value, readers=[node.name for node in nodes], norm=norm))
        self.factors[scaling_name(value)] = divisor.reciprocal()
        self._divisors.update(dict.fromkeys(sites, divisor))


def _why_without_data(site: MatrixSite) -> str:
    """Return why no value decides how a weight is rounded, "" where one does."""
    if site.reads:
        return "its rows are read as they are, too"
    if len({call.input for call in site.calls}) > 1:
        return "it is multiplied with several values"
    inputs = site.calls[0].in_features
    return f"{inputs} inputs, more than {WIDEST}" if inputs > WIDEST else ""


def _tensors(stored: Iterable[StoredMatrix]) -> dict[str, Tensor]:
    return {name: tensor for one in stored for name, tensor in one.tensors.items()}
