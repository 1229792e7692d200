"""codebook: stores weights as numbers of entries in a small table of floating-point values, for the size of the file.

    conv(x, w, b)    ->    conv(x, table[unpack(bytes)] * scale, b)        w = the nearest entry * the scale of its row

What is computed stays float. Runtimes that fold constants look weights of layers up once, when they load the file, and
are as fast as before.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import fx

from graphopt.ir.editor import Editor
from graphopt.ir.program import Program
from graphopt.passes.codes.choosing import encode
from graphopt.passes.codes.coded import Form
from graphopt.passes.codes.in_order import Inputs
from graphopt.passes.codes.knobs import knobs_of
from graphopt.passes.codes.plan import CodebookPlan, CodesRecord
from graphopt.passes.codes.rewrite import CodesRewriter
from graphopt.passes.codes.signs import SIGNS
from graphopt.passes.codes.sizes import OPERATORS, stored_bytes
from graphopt.passes.codes.storing import StoredCodes, store
from graphopt.passes.layers.code_packing import BYTE, bases, digits
from graphopt.passes.layers.input_moments import InputMoments, gather
from graphopt.passes.layers.matrix_sites import MatrixSite, check_skip, find_sites
from graphopt.passes.layers.skipping import as_asked, check_not_folded
from graphopt.pipeline.context import Context
from graphopt.pipeline.knobs import Knob
from graphopt.pipeline.pass_base import Pass
from graphopt.pipeline.plan import Refusal
from graphopt.statistics.calibration import read_batches
from graphopt.targets.description import TargetDescription

logger = logging.getLogger(__name__)

_BITS, _SAMPLES, _BATCH = 4, 256, 32


@dataclass(frozen=True, slots=True)
class CodebookOptions:
    """What weights are stored as, and which.

    codes: entries by k-means, or (experimental) signs with a scale for each output: ternary, with zeros, or binary.
    bits: of a code, of k-means: a table has 2 to the power of it entries.
    vector: consecutive weights of an output that one code stands for, of k-means.
    group: outputs of a layer that share a table, of k-means; 0: all of them.
    tables: embedding tables too.
    inputs: whether, where there is data, it is the errors of products that are made small: they count by the mean
        square of what weights are multiplied with, and codes chosen later make up for those before.
    samples: calibration samples used.
    skip: what is left as it is, as globs of module paths, weights or nodes.
    """

    codes: Literal["kmeans", "ternary", "binary"] = "kmeans"
    bits: Annotated[int, Field(ge=1, le=8)] = _BITS
    vector: Annotated[int, Field(ge=1)] = 1
    group: Annotated[int, Field(ge=0)] = 0
    tables: bool = True
    inputs: bool = True
    samples: Annotated[int, Field(ge=1)] = _SAMPLES
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what would change nothing."""
        if self.codes != "kmeans":
            given = {"bits": self.bits != _BITS, "vector": self.vector != 1, "group": self.group != 0}
            if unread := next((name for name, differs in given.items() if differs), None):
                raise ValueError(f"codes={self.codes} reads no `{unread}`; codes=kmeans does")
        if self.samples != _SAMPLES and not self.inputs:
            raise ValueError("inputs=no reads no `samples`")


class Codebook(Pass[CodebookOptions, CodebookPlan]):
    """Store the weights of layers and embedding tables as numbers of entries in tables of values. Lossy.

    1. Convolutions (1d, 2d, 3d, grouped, transposed), `linear`, `addmm`, `mm`, `matmul` with a stored matrix; one that
       several share is stored once. Rows of embedding tables are looked up when they are read.
    2. `kmeans`: each weight, or each `vector` of them (product quantization), is the nearest of 2^bits entries, which
       are fitted to the layer, with a scale for each output; tables of fewer outputs have more entries in all.
    3. `ternary`, `binary` (experimental): signs with the scale of least squared error for each output.

    Left as they are, with the reason: weights that would not become smaller with their tables, that are computed, no
    float32, without elements, NaN, written to or read by others; recurrent layers and bags; layers in regions of a
    graph; what `skip` names.
    """

    name = "codebook"
    options_type = CodebookOptions
    plan_type = CodebookPlan
    cached = True
    needs = ("folded",)
    produces = ("quantized",)
    after = ("drop_blocks", "prune", "svd", "recover", "equalize")
    before = ("int8", "half", "bfloat16")
    conflicts = ("sparsity24",)  # entries of a table keep no pattern of zeros

    def plan(self, program: Program, ctx: Context) -> CodebookPlan:
        """Choose entries and codes of every weight that becomes smaller by it.

        Raises:
            UsageError: a glob of `skip` names nothing.
            DataError: the data make values NaN or infinite.
        """
        gm = program.graph_module
        found, refusals = find_sites(gm, convolutions=True)
        check_not_folded(self.options.skip, program, ctx)
        check_skip(self.options.skip, found, gm)
        sites: dict[MatrixSite, Form] = {}
        for site in found:
            form = self._form(site, gm)
            reason = self._why_not(site, form, gm)
            if reason is None:
                sites[site] = form
            else:
                refusals.append(Refusal(site.weight_name, *reason))
        if said := _why_none(sites, gm):
            refusals += [Refusal(site.weight_name, said) for site in sites]
            sites = {}
        coded: dict[str, StoredCodes] = {}
        inputs = self._with_inputs(program, list(sites), ctx)
        for site, met in ctx.progress.track(inputs, "choosing codes", len(sites)):
            coded[site.weight_name] = self._coded(site, sites[site], met, gm, ctx)
        stored = {site.weight_name: coded[site.weight_name] for site in sites}  # in graph order
        plan = self.new_plan(
            sites=list(stored),
            refusals=refusals,
            tensors={name: tensor for one in stored.values() for name, tensor in one.tensors.items()},
            weights={name: one.record for name, one in stored.items()},
            notes=self._notes([one.record for one in stored.values()], ctx.targets),
        )
        logger.info("codebook: %s", plan.summary())
        return plan

    def apply(self, program: Program, plan: CodebookPlan) -> Program:
        """Let every layer read what is looked up."""
        program = program.copy()
        editor = Editor(program.graph_module, self.name)
        CodesRewriter(editor, plan).run()
        return program.with_graph(editor.finish())

    def knobs(self, program: Program, ctx: Context) -> list[Knob]:
        """List what it does to each weight."""
        return knobs_of(program, self.plan(program, ctx))

    def _form(self, site: MatrixSite, gm: fx.GraphModule) -> Form:
        rows = len(site.rows(gm))
        if self.options.codes != "kmeans":
            return Form(self.options.codes, len(SIGNS[self.options.codes]), 1, rows)
        group = rows if site.reads or self.options.group == 0 else min(self.options.group, rows)
        return Form("kmeans", 1 << self.options.bits, self.options.vector, group)

    def _why_not(self, site: MatrixSite, form: Form, gm: fx.GraphModule) -> tuple[str, str] | None:
        """Return why a weight stays as it is, and the same without particulars."""
        if glob := site.skipped(self.options.skip):
            return as_asked(glob)
        if site.reads and not self.options.tables:
            return "embedding tables are left float as asked (tables=no)", ""
        before, after = _bytes(site, form, gm)
        if after >= before:
            return f"with table and operators it would take {after} bytes instead of {before}", "not smaller"
        return None

    def _with_inputs(
        self, program: Program, sites: Sequence[MatrixSite], ctx: Context
    ) -> Iterator[tuple[MatrixSite, Inputs | None]]:
        """Pair each site with what it is multiplied with, where data tell."""
        asked = sites if self.options.inputs and ctx.samples is not None else []
        wanted = [site for site in asked if not site.reads]
        if wanted and ctx.samples is not None:
            batches = read_batches(program, ctx.samples, limit=self.options.samples, batch_size=_BATCH)
            for site, moments in gather(program, wanted, batches, 1, ctx.progress):
                yield site, _inputs(site, moments)
        yield from ((site, None) for site in sites if site not in wanted)

    def _coded(
        self, site: MatrixSite, form: Form, inputs: Inputs | None, gm: fx.GraphModule, ctx: Context
    ) -> StoredCodes:
        matrix = site.rows(gm).cpu()
        coded = encode(matrix, form, inputs, ctx.generator(f"codebook/{site.weight_name}"))
        name = Editor(gm, self.name).new_name(f"{site.weight_name}_codebook")
        return store(site, name, matrix, coded, form, weighted=inputs is not None)

    def _notes(self, records: Sequence[CodesRecord], targets: Sequence[TargetDescription]) -> tuple[str, ...]:
        if not records:
            return ()
        before, after = (sum(record["bytes"][i] for record in records) / 1e6 for i in (0, 1))
        said = [f"{len(records)} weights take {after:.3f} MB instead of {before:.3f}"]
        for target in targets:
            when = "when it loads the file: it runs as fast as float32, in as much memory"
            said.append(f"{target.name} looks weights of layers up {when if target.folds else 'in every run'}")
        if self.options.codes != "kmeans":
            said.append(f"{self.options.codes} codes are experimental: without training they cost much of the accuracy")
        return tuple(said)


def _bytes(site: MatrixSite, form: Form, gm: fx.GraphModule) -> tuple[int, int]:
    """Return the bytes of a weight before and after."""
    matrix = site.rows(gm)
    rows, columns = matrix.shape
    operators = OPERATORS * len(bases(form.entries))
    return matrix.nbytes, stored_bytes(rows, columns, form, by_rows=bool(site.reads)) + operators


def _why_none(sites: Mapping[MatrixSite, Form], gm: fx.GraphModule) -> str:
    """Return why all weights together would not be smaller, "" if they are: what unpacks them serves all."""
    parts = {base for form in sites.values() for base in bases(form.entries)}
    shared = sum(digits(base).nbytes for base in parts if base < BYTE)
    pairs = [_bytes(site, form, gm) for site, form in sites.items()]
    saved = sum(before - after for before, after in pairs)
    return f"all together would save {saved} bytes, and unpacking takes tables of {shared}" if saved <= shared else ""


def _inputs(site: MatrixSite, moments: InputMoments) -> Inputs | None:
    """Return what a weight is multiplied with, in the order of its columns; None of nothing."""
    if not moments.rows:
        return None
    call, matrices = site.calls[0], [matrix.cpu() for matrix in moments.matrices()]
    largest = max(float(matrix.abs().amax()) for matrix in matrices) or 1.0
    matrices = [matrix / largest for matrix in matrices]  # what they are to each other counts, and is in range
    columns = torch.arange(call.fan_in).reshape(math.prod(call.kernel), -1).t().flatten()  # taps come first in moments
    squares = torch.cat([matrix.diagonal(dim1=1, dim2=2) for matrix in matrices], 1)[:, columns].float()
    shared = [matrix[columns][:, columns] for matrix in matrices[0]] if len(matrices) == 1 else []
    each = call.out_features // call.groups
    return Inputs(squares.unsqueeze(1).expand(-1, each, -1).flatten(0, 1), shared)
