"""recover, qat: the unoptimised program teaches the optimised one what it lost, without labels.

    statistics   every BatchNorm's mean and variance, re-estimated by running forward on up to 8,192 samples
    blocks       each block is given what the unoptimised one is given, and learns to give what that gives
    end-to-end   all weights are trained together on
                 T^2 KL(teacher || student) + |student - teacher|^2 / |teacher|^2          for logits
                 |student - teacher|^2 / |teacher|^2                                       for other outputs
                 + alpha * mean over taps of |student - teacher|^2 / |teacher|^2           at block boundaries

Trained tensors are the plan's payload; applying it puts them in place byte for byte.

`qat` does the same to integers, which it rounds again at every step (quantization-aware distillation):

    w' = round(clamp(w / s)) * s        d loss / d w = d loss / d w' where w is in range, 0 elsewhere (straight through)
                                        d loss / d s as in LSQ (Esser et al. 2020, "Learned Step Size Quantization")

It stands behind whatever stores weights as integers, and trains what that has made of the program, where it stands: on
a twin that computes the same on real numbers (`passes.twins`). So every form and option of every such pass can be
trained, the steps begin as those that calibration chose, the graph that comes out is the one that went in, and a report
shows what training is worth.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Final, Literal, Protocol

from pydantic import Field
from torch import Tensor

from graphopt.data.split import FEWEST
from graphopt.distillation.addresses import resolve
from graphopt.distillation.augment import channel_axis, view_of
from graphopt.distillation.cuts import auto_taps
from graphopt.distillation.loop import Precision, Schedule
from graphopt.distillation.losses import tap_loss_for
from graphopt.distillation.objective import Objective, comparable, targets_of
from graphopt.distillation.pairing import Pair, derived_from, pair_stages, pair_taps
from graphopt.distillation.pool import Pool
from graphopt.distillation.recovery import Material, Stage, recover
from graphopt.distillation.statistics import batch_norms
from graphopt.distillation.taps import own_outputs, strip_taps
from graphopt.distillation.weights import integer_weights, overwrite, trainable
from graphopt.errors import PassError
from graphopt.ir.program import Program
from graphopt.passes.twins.twin import Twin, twin_of
from graphopt.pipeline.context import Context
from graphopt.pipeline.pass_base import Pass
from graphopt.pipeline.plan import Plan, Refusal
from graphopt.quantization.stored import is_quantized

logger = logging.getLogger(__name__)

AUTO: Final = "auto"

_TAPS = 12  # taps that auto places at most
_EPOCHS = 8
# Of 200 samples, which 8 epochs run through in 32 steps, 48 epochs took the held-out loss of twelve of fourteen small
# networks after prune or svd to 0.46 to 0.89 of what 8 did.
_FEWEST_STEPS = 128
_RATES_OF_INTEGERS = (0.003, 0.001, 0.0003)
_RATES = (0.03, 0.01, 0.003, 0.001, 0.0003)

Augmentation = Literal["auto", "flip", "shift"]


@dataclass(frozen=True, slots=True)
class RecoverOptions:
    """How long, on what and towards what to train.

    stages: which are tried, statistics, blocks, end-to-end: what each makes is kept if the held-out loss falls. Blocks
        are trained for a quarter of the epochs.
    epochs: passes over the samples; 0 re-estimates BatchNorm statistics only; none: 8, and over few samples as many as
        make 128 steps.
    lr: largest AdamW step, as a fraction of the root mean square of each tensor; none: the best of several in a few
        steps each, scaled to the length of the training.
    batch_size: samples per step, over all processes.
    parts: that the samples of a step are computed in, one after the other, for less memory.
    clip: norm that all gradients together are scaled down to; none: as they are.
    average: judge moving averages of the weights, of which a step keeps this share; none: the weights.
    patience: epochs without a lower held-out loss that end training; none: it runs to its end, where the rate is 0.
    precision: what products are computed in while training, bfloat16 or float32.
    samples: train on at most so many; none: all there are.
    temperature: softens the teacher's logits.
    alpha: weight of the tap losses against the output loss; 0 leaves the taps out.
    taps: addresses in the unoptimised program, as `distill_hooks` takes them; auto: block boundaries.
    augment: views of the samples, flip+shift for images; auto: both where the input looks like images.
    """

    # Defaults by measurement on ResNet-20, see tools/bench_recover.py.
    stages: tuple[Stage, ...] = ("statistics", "end-to-end")
    epochs: Annotated[int, Field(ge=0)] | None = None
    lr: Annotated[float, Field(gt=0, le=1)] | None = None
    batch_size: Annotated[int, Field(ge=2)] = 64
    parts: Annotated[int, Field(ge=1)] = 1
    clip: Annotated[float, Field(gt=0)] | None = None
    average: Annotated[float, Field(gt=0, lt=1)] | None = None
    patience: Annotated[int, Field(ge=1)] | None = None
    precision: Precision = "float32"
    samples: Annotated[int, Field(ge=FEWEST)] | None = 16384
    temperature: Annotated[float, Field(gt=0)] = 4.0
    alpha: Annotated[float, Field(ge=0)] = 10.0
    taps: tuple[str, ...] | None = (AUTO,)
    augment: tuple[Augmentation, ...] | None = (AUTO,)


@dataclass(frozen=True, kw_only=True)
class RecoverPlan(Plan):
    """Sites are the tensors that change; the payload holds them.

    Attributes:
        outputs: how each output was imitated.
        taps: the loss at each tap, by its address in the unoptimised program.
        views: the augmentations that were used.
    """

    outputs: Mapping[str, str] = field(default_factory=dict)
    taps: Mapping[str, str] = field(default_factory=dict)
    views: tuple[str, ...] = ()

    def summary(self) -> str:
        """Add what each stage won: the loss on held-out samples before, and after it, with the time it took."""
        stages: Any = self.measured.get("stages") or ()
        won = "".join(f", {_said(stage, self.seconds)}" for stage in stages)
        return super().summary() + (f"; held-out loss {self.measured['before']:.4g}{won}" if won else "")


class Trainee(Protocol):
    """What is trained in the place of a program."""

    @property
    def program(self) -> Program:
        """A program of the same inputs and outputs."""

    def stored(self, trained: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the tensors of the program in whose place it is, by those of its own that training changed."""


@dataclass(frozen=True)
class _Itself:
    program: Program

    def stored(self, trained: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return trained


class Recover(Pass[RecoverOptions, RecoverPlan]):
    """Win back accuracy by distillation from the unoptimised program; needs data, no labels.

    1. BatchNorm statistics are re-estimated, then the weights are trained on soft labels and on values at block
       boundaries, by AdamW under Accelerate, without Dropout; BatchNorm by batches or by its statistics, as pays.
    2. What is kept is what has the lowest loss on the samples that no pass fits: trained weights, statistics alone,
       or, with a refusal, what came in. The result is never further from the unoptimised program than before.
       A rate at which the loss stops being finite ends training; what was best by then is kept.
    3. Refused: a program with int8 weights (they are frozen: recover stands before int8), one without any floating
       parameter, one whose outputs already agree, outputs and taps that have no gradient or no counterpart.
    4. Taps of `distill_hooks` in the program stay outputs and are not changed.
    5. After each epoch all that the next depends on is kept in the cache: a killed run goes on there, to the same
       bytes.
    """

    name = "recover"
    options_type = RecoverOptions
    plan_type = RecoverPlan
    cached = True
    rates: ClassVar[tuple[float, ...]] = _RATES

    def plan(self, program: Program, ctx: Context) -> RecoverPlan:
        """Train a copy and store what it learned.

        Raises:
            DataError: there is no data, or too little.
            PassError: the outputs are not those of the unoptimised program, or not finite.
        """
        reason = self.why_not(program)
        if reason:
            return self.new_plan(sites=(), refusals=[Refusal("program", reason, reason.partition(":")[0])])
        samples = ctx.need_samples(self.name, "to imitate the unoptimised program on")
        held = Pool.read(ctx.need_held_out(self.name), None)
        training = Pool.read(samples, self.options.samples)
        batch_size = self._batch_size(program)
        trainee = self.trainee(program, ctx)
        teacher, student = strip_taps(ctx.original), strip_taps(trainee.program)
        _check_outputs(teacher, student, self.name)
        targets, refusals = targets_of(teacher)
        trains = self.options.epochs != 0
        pairs, left = self._pairs(teacher, student) if trains else ([], [])
        refusals += left
        if not targets:
            return self.new_plan(sites=(), refusals=refusals)
        objective = Objective(targets, pairs, self.options.temperature, self.options.alpha)
        views = self._views(program) if trains else ()
        material = Material(training, held, batch_size, view_of(views, program))
        rates = self.rates if self.options.lr is None else (self.options.lr,)
        found = recover(
            student,
            teacher,
            objective,
            material,
            self._schedule(rates[0], len(training.batches(batch_size, takes=student.takes))),
            rates,
            ctx,
            by=self.name,
            stages=self.options.stages,
            precision=self.options.precision,
        )
        refusals += [Refusal(what, reason, reason.partition(":")[0]) for what, reason in found.left.items()]
        tensors = trainee.stored(found.tensors)
        plan = self.new_plan(
            sites=tensors,
            refusals=refusals,
            tensors=tensors,
            measured={"before": found.before, "after": found.after, "stages": found.stages},
            seconds=found.seconds,
            outputs={target.name: target.kind for target in targets},
            taps={pair.teacher.address: _loss_name(teacher, student, pair) for pair in pairs},
            views=views,
        )
        logger.info("%s: %s", self.name, plan.summary())
        return plan

    def apply(self, program: Program, plan: RecoverPlan) -> Program:
        """Put the tensors of the plan in place."""
        missing = sorted(set(plan.tensors) - set(program.state_dict()))
        if missing:
            raise PassError(f"The program has no tensor `{missing[0]}`: the plan was made for another. Plan again.")
        result = program.copy(share_tensors=False)
        overwrite(result, plan.tensors)
        return result

    def why_not(self, program: Program) -> str:
        """Return why a program cannot be trained, "" if it can."""
        frozen = integer_weights(program)
        if frozen:
            return f"weights are stored as integers: `{frozen[0]}` is trained by qat, or put recover before int8"
        if not trainable(program):
            return "there is no trainable parameter: the program holds no floating parameter with a gradient"
        return ""

    def trainee(self, program: Program, ctx: Context) -> Trainee:
        """Return what is trained in the place of a program: here itself."""
        return _Itself(program)

    def _schedule(self, rate: float, per_epoch: int) -> Schedule:
        enough = max(_EPOCHS, math.ceil(_FEWEST_STEPS / per_epoch))
        return Schedule(
            enough if self.options.epochs is None else self.options.epochs,
            rate,
            patience=self.options.patience,
            parts=self.options.parts,
            clip=self.options.clip,
            average=self.options.average,
        )

    def _batch_size(self, program: Program) -> int:
        size = program.takes(self.options.batch_size)
        if self.options.parts > 1 and program.batch_size is not None:
            raise PassError(
                f"The program takes {program.batch_size} samples at a time, and {self.name}:parts={self.options.parts} "
                "would divide them. Capture it with a dynamic batch, or leave the option out."
            )
        if size < 2 and batch_norms(program):
            raise PassError(
                "The program takes one sample at a time, and BatchNorm cannot be trained on single samples. Capture it "
                "with a dynamic batch, or fold the BatchNorms first: --passes ...,fold,recover."
            )
        return size

    def _pairs(self, teacher: Program, student: Program) -> tuple[list[Pair], list[Refusal]]:
        """Find the taps and what stands for them in the student."""
        if self.options.taps is None or not self.options.alpha:
            return [], []
        taps, refusals = resolve(teacher, [address for address in self.options.taps if address != AUTO])
        if not derived_from(student, teacher):
            reason = "the program was not made from the unoptimised one: only stages are paired"
            kept, left = comparable(teacher, student, pair_stages(teacher, student))
            return kept, [*refusals, *(Refusal(tap.address, reason) for tap in taps), *left]
        if AUTO in self.options.taps:
            taps += [tap for tap in auto_taps(teacher, _TAPS) if tap not in taps]
        pairs, unpaired = pair_taps(teacher, student, taps)
        kept, incomparable = comparable(teacher, student, pairs)
        return kept, [*refusals, *unpaired, *incomparable]

    def _views(self, program: Program) -> tuple[str, ...]:
        wanted = self.options.augment or ()
        if AUTO in wanted:
            return ("flip", "shift") if channel_axis(program) else ()
        if wanted and len(program.inputs[0].shape) != 4:
            raise PassError(
                f"{self.name}:augment={'+'.join(wanted)} moves images, and the first input is {program.inputs[0]}. "
                "Leave the option out, or say augment=none."
            )
        return tuple(wanted)


@dataclass(frozen=True, slots=True)
class QatOptions(RecoverOptions):
    """How long, on what and towards what to train, and whether steps are trained too.

    lr: largest AdamW step, as a fraction of the root mean square of each tensor, and of each step of integers; none:
        the best of several in a few steps each, scaled to the length of the training, 0.003 at most.
    steps: of integers: learned, or fixed as calibration chose them.
    """

    steps: Literal["learned", "fixed"] = "learned"


class Qat(Recover):
    """Train a quantized program in the form in which it computes, towards the unoptimised one; no labels.

    1. Weights and biases that are stored as integers of any number of bits are trained as the floating numbers that
       are rounded to them, beginning where the program had them before it was quantized; floating ones as they are.
    2. Steps of weights and activations are learned, but where a kernel takes one of them for given.
    3. LSTMs keep their integers, which gradients pass through.
    4. Weights of layers that are looked up in a codebook may change their entry, and the entries of k-means are
       learned; signs (binary, ternary) have their scales learned. Of embedding tables the entries alone are.
    5. Norms are folded before weights are quantized: there are no statistics to freeze.
    6. What is kept is what has the lowest loss on the samples that no pass fits, or, with a refusal, what came in.
    """

    name = "qat"
    options_type = QatOptions
    needs = ("quantized",)
    after = ("drop_blocks", "prune", "svd", "recover", "sparsity24", "codebook", "weights", "int8", "mixed")
    before = ("half", "bfloat16")
    cached = True
    reads_floating = True
    rates = _RATES_OF_INTEGERS
    options: QatOptions

    def why_not(self, program: Program) -> str:
        """Return why a program is not trained, "" if it is."""
        return "" if is_quantized(program) else "nothing is stored as integers: recover trains floating weights"

    def trainee(self, program: Program, ctx: Context) -> Twin:
        """Return the twin of a quantized program."""
        return twin_of(program, ctx.floating, ctx.original, learn_steps=self.options.steps == "learned")


def _check_outputs(teacher: Program, student: Program, name: str) -> None:
    if [spec.dtype for spec in own_outputs(teacher)] != [spec.dtype for spec in own_outputs(student)]:
        raise PassError(
            f"Pass `{name}` compares outputs, and the program has {[*map(str, student.outputs)]} where the "
            f"unoptimised one has {[*map(str, teacher.outputs)]}. Leave out the pass that changed them."
        )


def _said(stage: Mapping[str, Any], seconds: Mapping[str, float]) -> str:
    """Return "blocks 1.23 (9 blocks, 2.1 s each)"."""
    name, blocks = stage["stage"], stage.get("blocks")
    notes = [] if stage["kept"] else ["not kept"]
    notes += [f"{blocks} blocks"] if blocks else [f"rate {stage['rate']:g}"] if "rate" in stage else []
    if name in seconds:  # not in a plan that was found
        notes.append(f"{seconds[name] / (blocks or 1):.1f} s{' each' if blocks else ''}")
    return f"{name} {'diverged' if stage['loss'] is None else format(stage['loss'], '.4g')} ({', '.join(notes)})"


def _loss_name(teacher: Program, student: Program, pair: Pair) -> str:
    wanted = next(node for node in teacher.graph.nodes if node.name == pair.teacher.node).meta["val"]
    found = next(node for node in student.graph.nodes if node.name == pair.student.node).meta["val"]
    return tap_loss_for([*map(str, found.shape)], [*map(str, wanted.shape)])[0]
