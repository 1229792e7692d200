"""What a user can ask of prune."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from graphopt.data.split import FEWEST
from graphopt.loading.functions import is_function_name
from graphopt.measure.budget import Budget

GroupKind = Literal["channels", "hidden", "heads", "head_dim", "width"]
Criterion = Literal["l1", "l2", "random", "fpgm", "bn_scale", "lamp", "activation", "taylor", "obd"]
Limit = Annotated[float, Field(gt=0)]

DEFAULT_RATIO = 0.3
_WITH_LOSS: tuple[Criterion, ...] = ("taylor", "obd")


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """How much goes, and by which measure.

    ratio: share of each group's indices to remove (of all groups' together with scope=global).
    parameters: instead of a ratio, keep at most this share of the original's parameters, or at most so many if above 1.
    flops: likewise of its floating-point operations for one sample.
    bytes: likewise of the bytes of its tensors.
    latency: likewise of the time it takes in the target's runtime, measured here; a share.
    criterion: what makes an index worth keeping, see `graphopt.passes.pruning.criteria`: its weights (l1, l2, fpgm,
        lamp), the norm scale behind it (bn_scale), what it carries (activation), what the outputs lose without it
        (taylor, obd), or random as a control.
    loss: what taylor and obd follow gradients of, as module:function; it takes the model's output and the labels, None
        where the data has none, and returns a scalar. none: the one given from Python, or the distance to the unpruned
        outputs.
    scope: rank within each group (local), or all groups against each other (global).
    ratios: other ratios for some groups, as ratio@glob of names like `0.5@layer1.*`; 0 leaves them whole.
    skip: groups to leave whole, as globs; short for 0@glob.
    round_to: round the kept count up to a multiple; none: to what gives layers the targets' channel alignment.
    min_channels: keep at least so many of every group.
    kinds: which kinds of axis may go.
    steps: remove in so many rounds, and rank what is left anew after each.
    epochs: `recover` for so many in between, which needs data; none: nothing is trained.
    guard: alignment trusts round_to to keep the runtime fast; measure times each class of groups in the target's
        runtime and leaves whole what does not pay.
    compensate: with data, refit the layers behind what is removed, so that the model works before any training.
    samples: calibration samples used at most.
    """

    ratio: Annotated[float, Field(ge=0, lt=1)] = DEFAULT_RATIO
    parameters: Limit | None = None
    flops: Limit | None = None
    bytes: Limit | None = None
    latency: Annotated[float, Field(gt=0, lt=1)] | None = None
    criterion: Criterion = "l2"
    loss: str | None = None
    scope: Literal["local", "global"] = "local"
    ratios: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    round_to: Annotated[int, Field(ge=1)] | None = None
    min_channels: Annotated[int, Field(ge=1)] = 2
    kinds: tuple[GroupKind, ...] = ("channels", "hidden", "heads", "head_dim", "width")
    steps: Annotated[int, Field(ge=1, le=100)] = 1
    epochs: Annotated[int, Field(ge=1)] | None = None
    guard: Literal["alignment", "measure"] = "alignment"
    compensate: bool = True
    samples: Annotated[int, Field(ge=FEWEST)] = 1024

    def __post_init__(self) -> None:
        """Refuse a ratio beside a target, a loss nothing follows, training of no round, overrides that are none."""
        limits = self.budget.limits
        if limits and self.ratio != DEFAULT_RATIO:
            name = next(iter(limits))
            raise ValueError(f"`ratio` says how much goes and `{name}` how much stays; give one of them")
        if self.loss is not None:
            if not is_function_name(self.loss):
                raise ValueError("`loss` is no module:function, as in loss=my_losses:smooth")
            if self.criterion not in _WITH_LOSS:
                raise ValueError(f"criterion={self.criterion} follows no `loss`; {' and '.join(_WITH_LOSS)} do")
        if self.epochs is not None and self.steps == 1:
            raise ValueError("steps=1 has nothing in between: `epochs` are of the recoveries there")
        if self.epochs is not None and self.guard == "measure":
            raise ValueError(
                "guard=measure leaves groups whole in the last step, and `epochs` train without them before"
            )
        self.overrides  # noqa: B018 - reading it checks it

    @property
    def budget(self) -> Budget:
        """What may be left; without limits where `ratio` decides."""
        return Budget.of(self)

    @property
    def overrides(self) -> tuple[tuple[float, str, str], ...]:
        """The (ratio, glob, as the user wrote it) of `ratios` and `skip`."""
        return (*map(_override, self.ratios), *((0.0, glob, f"skip={glob}") for glob in self.skip))

    @property
    def measures(self) -> bool:
        """Whether planning takes times in the target's runtime."""
        return self.latency is not None or self.guard == "measure"


def _override(text: str) -> tuple[float, str, str]:
    ratio, at, glob = text.partition("@")
    try:
        value = float(ratio)
    except ValueError:
        value = -1.0
    if not at or not glob or not 0 <= value < 1:
        raise ValueError(f"`{text}` in `ratios` is no ratio@glob; write 0.5@layer1.*, with a ratio from 0 to below 1")
    return value, glob, f"ratios={text}"
