"""half, bfloat16: weights, and what is computed, in 16 bits; what needs the range or the digits stays in float32.

    linear(x, w)    ->    linear(to(x, float16), w')        the target computes in 16 bits
    linear(x, w)    ->    linear(x, to(w', float32))        it does not: they are what the file is half as large for

Inputs and outputs keep their types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import fx

from graphopt.errors import LoweringError
from graphopt.ir.editor import Editor
from graphopt.ir.operators import MOVES
from graphopt.ir.program import Program
from graphopt.passes.layers.skipping import check_not_folded
from graphopt.passes.precision.knobs import knobs_of
from graphopt.passes.precision.placement import Halves, Wishes, float32_tensors, place_halves
from graphopt.passes.precision.rewrite import Caster, read_in_float32, store
from graphopt.passes.precision.storage import stored_halves
from graphopt.pipeline.context import Context
from graphopt.pipeline.knobs import Knob
from graphopt.pipeline.pass_base import Pass
from graphopt.pipeline.plan import Plan
from graphopt.statistics.calibration import Calibration
from graphopt.statistics.extent import Extent
from graphopt.targets.description import TargetDescription

_SAMPLES, _AT_ONCE = 64, 16
_PASSES = {"float16": "half", "bfloat16": "bfloat16"}  # by the type that they store


@dataclass(frozen=True, slots=True)
class BFloat16Options:
    """What computes in 16 bits.

    compute: what weights are multiplied in: auto, 16 bits where the target's kernels do; yes, always; no, never: they
        are stored in them.
    skip: what is left in float32, as globs of module paths or nodes.
    keep: further operators that compute in float32, as globs of names like `gelu`, `matmul`.
    """

    compute: Literal["auto", "yes", "no"] = "auto"
    skip: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HalfOptions(BFloat16Options):
    """What computes in 16 bits, and how much data is looked at.

    samples: calibration samples whose values are looked at for overflow.
    batch_size: samples per calibration step; changes the last digits of the result at most.
    """

    samples: Annotated[int, Field(ge=1)] = _SAMPLES
    batch_size: Annotated[int, Field(ge=1)] = _AT_ONCE

    def __post_init__(self) -> None:
        """Refuse what would change nothing."""
        if self.compute == "no" and (self.samples, self.batch_size) != (_SAMPLES, _AT_ONCE):
            raise ValueError("compute=no looks at no values: no `samples` or `batch_size` with it")


@dataclass(frozen=True, kw_only=True)
class HalfPlan(Plan):
    """What is in 16 bits; the sites are calls that compute in them, or weights that are stored in them.

    Attributes:
        computed: calls that compute in 16 bits.
        weights: names of the tensors that are stored in them.
    """

    computed: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()


class Half(Pass[HalfOptions, HalfPlan]):
    """Compute in float16 where the target's kernels do, and store weights in it.

    1. Products, convolutions, attention, recurrent layers and embeddings compute in it, and sums, activations, moves
       between them; casts stand where that begins and ends.
    2. Softmax, norms, exponentials, powers, sums over many values and what no rule is known for compute in float32, as
       does what `skip` and `keep` name.
    3. Numbers that it cannot hold (masks of -3.4e38, an epsilon of 1e-12, positions), weights likewise, and what hangs
       on them stay in float32; so do values that reach half of 65504 on the data.
    4. Where the target only stores it, weights are stored in it and computed with in float32: no slower, no faster.

    Refused: targets that do neither.
    """

    name = "half"
    dtype: ClassVar[torch.dtype] = torch.float16
    options_type: ClassVar[type[BFloat16Options]] = HalfOptions
    plan_type = HalfPlan
    cached = True
    needs = ("folded",)
    after = ("fold", "drop_blocks", "prune", "svd", "recover", "sparsity24", "int8")
    conflicts = ("bfloat16",)
    reads_target = True

    def knobs(self, program: Program, ctx: Context) -> list[Knob]:
        """List what it does to each weight."""
        plan = self.plan(program, ctx)
        return knobs_of(program, plan.weights, frozenset(plan.computed), self.dtype)

    @property
    def _kind(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def accepts(self, target: TargetDescription) -> None:
        """Refuse a target that neither computes in the type nor stores it.

        Raises:
            LoweringError: it says what to do instead.
        """
        if self.options.compute == "auto" and target.float_kernels(self._kind) is None:
            others = "".join(f", use `{_PASSES[kernels.dtype]}`" for kernels in target.floats)
            raise LoweringError(
                f"Pass `{self.name}` is not for {target.name}, which has no {self._kind} kernels. "
                f"Leave it out{others}, or store weights in it alone ({self.name}:compute=no)."
            )

    def plan(self, program: Program, ctx: Context) -> HalfPlan:
        """Decide what is in 16 bits."""
        target = ctx.need_target(self.name)
        self.accepts(target)
        kernels = target.float_kernels(self._kind)
        without = kernels.without if kernels is not None else ()
        check_not_folded(self.options.skip, program, ctx)
        wishes = Wishes(self.options.skip, self.options.keep, without, target.name)
        wishes.check(program.graph_module)
        if self._computes(target):
            return self._plan_computing(program, ctx, wishes)
        weights, refusals = stored_halves(program.graph_module, self.dtype, wishes)
        said = (
            f"{target.name} has no {self._kind} kernels: weights are stored in it and computed with in float32, so "
            "that the file is smaller and nothing is faster (int8 is, where its kernels are)"
        )
        notes = (said,) if weights and self.options.compute == "auto" else ()
        return self.new_plan(sites=weights, refusals=refusals, weights=tuple(weights), notes=notes)

    def _plan_computing(self, program: Program, ctx: Context, wishes: Wishes) -> HalfPlan:
        placed = place_halves(program.graph_module, self.dtype, wishes)
        notes: tuple[str, ...] = ()
        if placed.calls and self.dtype is torch.float16:
            if ctx.samples is None:
                notes = ("without data it was not checked whether values overflow (beyond 65504)",)
            else:
                extents = self._extents(program, placed, ctx)
                placed = place_halves(program.graph_module, self.dtype, wishes, extents)
        calls = tuple(node.name for node in placed.calls)
        weights = tuple(placed.weights)
        return self.new_plan(sites=calls, refusals=placed.refusals, computed=calls, weights=weights, notes=notes)

    def apply(self, program: Program, plan: HalfPlan) -> Program:
        """Store weights in 16 bits and put casts where computing in them begins and ends."""
        program = program.copy()
        editor = Editor(program.graph_module, self.name)
        store(editor, plan.weights, self.dtype)
        if plan.computed:
            Caster(editor, self.dtype, plan.computed).run()
        else:
            read_in_float32(editor, plan.weights)
        return program.with_graph(editor.finish())

    def _computes(self, target: TargetDescription) -> bool:
        kernels = target.float_kernels(self._kind)
        computes = kernels is not None and kernels.computes
        return computes if self.options.compute == "auto" else self.options.compute == "yes"

    def _extents(self, program: Program, placed: Halves, ctx: Context) -> Mapping[fx.Node, float]:
        """Measure what the calls in 16 bits read and give; what only moves values is as large as what it moves."""
        values: dict[fx.Node, None] = {}
        for call in placed.calls:
            around = [value for value in (*call.all_input_nodes, call) if float32_tensors(value)]
            values.update(dict.fromkeys(value for value in around if isinstance(value.meta["val"], torch.Tensor)))
        roots = {value: _moved(value) for value in values if value.op != "get_attr"}
        observed = [root for root in dict.fromkeys(roots.values()) if root.op != "get_attr"]
        calibration = Calibration.of(
            ctx, program, self.name, limit=self.options.samples, batch_size=self.options.batch_size
        )
        found = calibration.gather((value.name, Extent()) for value in observed)
        extents = {root: extent.largest for root, extent in zip(observed, found, strict=True)}
        return {value: extents[root] for value, root in roots.items() if root in extents}


def _moved(value: fx.Node) -> fx.Node:
    """Return what a value is a rearrangement, or a part, of."""
    while value in MOVES:
        source = value.args[0]
        if not isinstance(source, fx.Node) or not (isinstance(source.meta["val"], torch.Tensor) or source in MOVES):
            break
        value = source
    return value


class BFloat16(Half):
    """Compute in bfloat16, which has the range of float32 and a third of its digits, as `half` does in float16.

    What `half` does holds for it, but that targets without kernels for it are refused unless `compute=no` stores
    weights in it alone; no value overflows, so data are not asked for.
    """

    name = "bfloat16"
    dtype = torch.bfloat16
    options_type = BFloat16Options
    cached = True
    conflicts = ("half",)
