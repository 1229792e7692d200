"""DistillPlan: who teaches what, at which values, by which losses and for how long, as data: TOML in, JSON out.

temperature = 4.0
alpha = 0.7                        # share of the teachers, the rest is the labels'
epochs = 15

[[pairs]]
student = "features.6"
teacher = "layer2"
loss = "values"
weight = 10.0
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from graphopt.errors import UsageError, cut, first_line, first_problem, printable
from graphopt.files import read_file

_LARGEST_FILE = 1 << 20  # bytes
_ALPHA = 0.5  # with labels, where a plan does not say
_FUNCTION = r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$"

Function = Annotated[str, Field(pattern=_FUNCTION)]  # of the user's own
OutputLoss = Literal["auto", "soft_labels", "gumbel_labels", "dist", "values", "cosine"]
LabelLoss = Literal["auto", "cross_entropy", "mse"]
PairLoss = Literal[
    "auto",
    "values",
    "cosine",
    "attention",
    "similarity",
    "distances",
    "angles",
    "attention_scores",
    "attention_probabilities",
    "value_relations",
]
Adapter = Literal["auto", "none"]
FEWEST = 64  # samples that are made up: of fewer, statistics say little
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
ViewName = Literal["auto", "flip", "shift", "mixup", "cutmix", "adversarial"]

_CLOSED = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)


class TeacherPlan(pydantic.BaseModel):
    """How much one of several teachers says, and of what, in the order that they are given in.

    Attributes:
        weight: of what it says, among them.
        inputs: whether it takes the student's or its own. auto: its own, where there are data of teachers.
    """

    model_config = _CLOSED

    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    inputs: Literal["auto", "student", "own"] = "auto"


class OutputPlan(pydantic.BaseModel):
    """How one output is taught.

    Attributes:
        student: name of the student's output.
        teacher: name of the output that teaches it; "": the one in the same place.
        loss: a name, or the user's `module:function` of the student's and the teacher's values. auto: soft labels for
            logits and probabilities, with the relative error beside them where no labels are for this output; for
            other values the relative error alone.
        weight: of its loss among those of the outputs; 0: it is not taught.
        axis: that holds its classes, which labels are of, too; None: the axis of the softmax, the channels of the
            convolution or the last of the Linear that it comes from.
    """

    model_config = _CLOSED

    student: str
    teacher: str = ""
    loss: OutputLoss | Function = "auto"
    weight: Weight = 1.0
    axis: Annotated[int, Field(ge=1)] | None = None


class PairPlan(pydantic.BaseModel):
    """One value of the student that a value of a teacher teaches.

    Attributes:
        student: its address in the student, as `distill_hooks` takes them.
        teacher: the address of what teaches it.
        loss: a name, or the user's `module:function`. auto: the relative error where an adapter can make the shapes
            equal, otherwise what the shapes allow.
        weight: of its loss beside those of outputs and labels.
        adapter: whether values of other shapes get layers of their own between them, which are trained and dropped.
        channels: which of the teacher's channels the student's are, in the place of an adapter.
        by: which teacher it is a value of, counted from 0; "student": it is a deeper value of the student itself.
    """

    model_config = _CLOSED

    student: str
    teacher: str
    loss: PairLoss | Function = "auto"
    weight: Weight = 1.0
    adapter: Adapter = "auto"
    channels: tuple[Annotated[int, Field(ge=0)], ...] = ()
    by: Annotated[int, Field(ge=0)] | Literal["student"] = 0


class HeadPlan(pydantic.BaseModel):
    """A head on a shallower value of the student, which learns from labels and from the student's own output.

    Attributes:
        student: the address of the value; each that a glob matches gets its own.
        weight: of what it learns beside outputs and labels, of which `alpha` is the share of the student's output.
    """

    model_config = _CLOSED

    student: str
    weight: Weight = 1.0


class DistillPlan(pydantic.BaseModel):
    """What a student learns, and how.

    Attributes:
        temperature: softens logits.
        alpha: share of the teachers' outputs in the loss, the rest is the labels'; None: 0.5 with labels, 1 without.
        outputs: how outputs are taught; those that are not named are by `auto`.
        teachers: several teachers, in the order that they are given in; none: all weigh the same.
        pairs: values inside that are taught too.
        heads: heads on shallower values of the student, dropped after training.
        features: pairs that are found: "stages" where the spatial size changes, or blocks end; "auto": those, where no
            output of a teacher fits one of the student; "none".
        feature_loss: of pairs that are found.
        feature_weight: likewise, of each.
        label_loss: a name, or the user's `module:function` of output and labels. auto: cross-entropy for class numbers,
            the mean squared error for floats.
        label_output: the output that labels are for; "": the first.
        head: so many classes are to be in that output: the student's last layer is drawn anew; None: it stays.
        epochs: passes over the samples.
        lr: largest step, as a fraction of the size of each tensor; None: 0.03 with BatchNorm; without, the best of
            several in a few steps each, scaled to the length of the training, 0.1 at most.
        batch_size: samples per step.
        samples: train on at most so many; None: all there are.
        synthesised: without data, so many samples are made up of the statistics that the first teacher keeps.
        patience: epochs without a lower held-out loss before stopping; None: all are run.
        parts: that the samples of a step are computed in, one after the other, for less memory.
        clip: norm that all gradients together, those of adapters among them, are scaled down to; None: as they are.
        average: judge moving averages of the weights, of which a step keeps this share; None: the weights.
        precision: what products are computed in while training, bfloat16 or float32.
        augment: views of the samples that student and teachers both see: of images, and "adversarial" of any floats.
            auto: flip and shift where inputs look like images and labels, if any, are class numbers.
    """

    model_config = _CLOSED

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 4.0
    alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    outputs: tuple[OutputPlan, ...] = ()
    teachers: tuple[TeacherPlan, ...] = ()
    pairs: tuple[PairPlan, ...] = ()
    heads: tuple[HeadPlan, ...] = ()
    features: Literal["auto", "stages", "none"] = "auto"
    feature_loss: PairLoss | Function = "auto"
    feature_weight: Weight = 1.0
    label_loss: LabelLoss | Function = "auto"
    label_output: str = ""
    head: Annotated[int, Field(ge=1)] | None = None
    epochs: Annotated[int, Field(ge=1)] = 8
    lr: Annotated[float, Field(gt=0, le=1)] | None = None
    batch_size: Annotated[int, Field(ge=2)] = 64
    samples: Annotated[int, Field(ge=1)] | None = None
    synthesised: Annotated[int, Field(ge=FEWEST)] | None = None
    patience: Annotated[int, Field(ge=1)] | None = None
    parts: Annotated[int, Field(ge=1)] = 1
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    average: Annotated[float, Field(gt=0, lt=1)] | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    augment: tuple[ViewName, ...] = ("auto",)

    @property
    def needs_labels(self) -> bool:
        """Whether it says something of labels."""
        return self.alpha != 1 and (self.alpha is not None or self.label_loss != "auto" or bool(self.label_output))

    def share_of_teachers(self, *, labelled: bool) -> float:
        """Return the share of teachers' outputs in the loss, with labels or without."""
        return self.alpha if self.alpha is not None else (_ALPHA if labelled else 1.0)

    def apart(self, count: int, *, given: bool) -> list[bool]:
        """Say of so many teachers whether each takes inputs of its own, for which data are given or not.

        Raises:
            UsageError: the plan is of other teachers, or one is to have inputs of its own, and there are no such data.
        """
        if len(self.teachers) not in (0, count):
            raise UsageError(f"The plan is of {len(self.teachers)} teachers, and {count} were given.")
        said = [teacher.inputs for teacher in self.teachers] or ["auto"] * count
        if "own" in said and not given:
            raise UsageError(
                f"The plan has teacher {said.index('own')}, counted from 0, take inputs of its own, and there are "
                "none. Give them, sample by sample as the student's: --teacher-data FILE, or teacher_data=..."
            )
        return [given and inputs != "student" for inputs in said]

    @property
    def functions(self) -> list[str]:
        """The functions of the user's own that it names."""
        losses = [self.label_loss, self.feature_loss]
        losses += [output.loss for output in self.outputs]
        losses += [pair.loss for pair in self.pairs]
        return [loss for loss in losses if ":" in loss]

    @classmethod
    def of(cls, given: DistillPlan | Mapping[str, Any] | str | Path | None) -> DistillPlan:
        """Return the plan that is given as one, as its fields, or as the path of a TOML file; None: the defaults.

        Raises:
            UsageError: there is no such file, it is none of these, or a field is not known or cannot have its value.
        """
        if isinstance(given, DistillPlan):
            return given
        if isinstance(given, str | Path):
            return cls.from_toml(Path(given))
        if given is not None and not isinstance(given, Mapping):
            raise UsageError(
                f"A distillation plan cannot be of type {type(given).__name__}. Give a DistillPlan, its fields as a "
                "dict, or the path of a TOML file."
            )
        return cls._read(dict(given or {}), "The distillation plan")

    @classmethod
    def from_toml(cls, path: Path) -> DistillPlan:
        """Read a plan from a file.

        Raises:
            UsageError: as `of` says.
        """
        try:
            content = tomllib.loads(read_file(path, most=_LARGEST_FILE).decode())
        except (OSError, ValueError, RecursionError) as err:
            said = getattr(err, "strerror", None) or printable(first_line(err))
            raise UsageError(f"{path} is no distillation plan: {said}. `graphopt presets` lists some to copy.") from err
        return cls._read(content, str(path))

    @classmethod
    def _read(cls, content: Mapping[str, Any], where: str) -> DistillPlan:
        try:
            return cls.model_validate_json(json.dumps(content, default=str))
        except pydantic.ValidationError as err:
            raise UsageError(f"{where} cannot be followed: {_problem(err)}.") from err

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON data, which `of` reads."""
        return self.model_dump(mode="json")


def _problem(err: pydantic.ValidationError) -> str:
    """Say what is wrong with a field; which fields there are, where one is not known."""
    place, kind = err.errors()[0]["loc"], err.errors()[0]["type"]
    problem = first_problem(err)
    field = [name for name in problem.path if not re.match(r"literal\[|constrained-|int$", name)]
    said = f"`{cut('.'.join(field), 80)}`: {problem.said}"
    if kind == "extra_forbidden":
        tables: dict[str, type[pydantic.BaseModel]] = {
            "outputs": OutputPlan,
            "pairs": PairPlan,
            "heads": HeadPlan,
            "teachers": TeacherPlan,
        }
        known = tables.get(str(place[0]), DistillPlan) if len(place) > 1 else DistillPlan
        return f"{said}. Known: {', '.join(known.model_fields)}"
    if kind == "literal_error" and field[-1].endswith("loss"):
        return f"{said}, or a function of yours, `module:function`"
    return said
