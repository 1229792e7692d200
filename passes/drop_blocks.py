"""drop_blocks: take out whole residual branches, those that contribute least.

    y = x + f(x)        becomes        y = x

Where the branches are is read from the graph (`graphopt.passes.residuals.branches`): convolutional blocks, attention,
feed-forward and inverted-bottleneck branches, side by side or one after the other, whatever they are called.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from graphopt.errors import PassError
from graphopt.ir.plain_data import Json
from graphopt.ir.program import Program
from graphopt.passes.residuals.branches import Branch, find_branches
from graphopt.passes.residuals.contribution import Criterion
from graphopt.passes.residuals.kind import BranchKind
from graphopt.passes.residuals.removal import without
from graphopt.passes.residuals.search import Limits, Search
from graphopt.pipeline.context import Context
from graphopt.pipeline.globs import check_globs, is_named
from graphopt.pipeline.options import exact
from graphopt.pipeline.pass_base import Pass
from graphopt.pipeline.plan import Plan, Refusal

logger = logging.getLogger(__name__)

DEFAULT_RATIO = 0.1


@dataclass(frozen=True, slots=True)
class DropBlocksOptions:
    """How many branches go, and by which measure. At most one of `blocks`, `ratio`, `sqnr`; none: `ratio=0.1`.

    blocks: number of branches to drop.
    ratio: share of the branches that could go, rounded down, one at least.
    sqnr: drop while the outputs stay within so many dB of the original's, on samples that are not chosen by where
        there are enough to spare some.
    criterion: the error of the outputs without the branch; how far it turns the stream it is added to; at random, as
        a control; from the last one on. The last two need no data.
    rescore: measure again after each drop what the others contribute now.
    kinds: which kinds of branch may go.
    only: branches that may go, as globs of names like `layer3.*`; none: all.
    skip: branches to keep, likewise.
    samples: calibration samples used.
    """

    blocks: Annotated[int, Field(ge=1)] | None = None
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    sqnr: Annotated[float, Field(gt=0)] | None = None
    criterion: Criterion = "output"
    rescore: bool = True
    kinds: tuple[BranchKind, ...] = ("attention", "convolution", "recurrent", "mlp", "mixer")
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    samples: Annotated[int, Field(ge=1)] = 128

    def __post_init__(self) -> None:
        """Check that the ways to say how many are not mixed."""
        given = [name for name in ("blocks", "ratio", "sqnr") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say how many branches go; give one of them")


@dataclass(frozen=True, kw_only=True)
class DropBlocksPlan(Plan):
    """Which branches go.

    Attributes:
        asked: how many branches the options ask for, None where `sqnr` says.
        dropped: names of the nodes that give their results, in the order they go; what `apply` reads.
        blocks: by name of the branch: its kind, the nodes of its result and sum, how many calls and parameters go
            with it, its score when it went (None: not finite).
    """

    asked: int | None = None
    dropped: tuple[str, ...] = ()
    blocks: Mapping[str, Mapping[str, Json]] = field(default_factory=dict)

    def summary(self) -> str:
        """Return "asked for 3, dropped 2; matched 12, ..."."""
        counts = super().summary()
        return f"asked for {self.asked}, dropped {len(self.dropped)}; {counts}" if self.asked else counts


class DropBlocks(Pass[DropBlocksOptions, DropBlocksPlan]):
    """Drop the residual branches that contribute least. Lossy; with data by default by the error of the outputs.

    1. `x + f(x)` becomes `x`, whatever is in `f`: layer scale, gates, dropped paths, masks from elsewhere.
    2. Of parallel branches `x + a(x) + b(x)` each may go by itself.
    3. Of a block whose shortcut is projected, `p(x) + f(x)`, the projection stays.
    4. Of blocks inside blocks what contributes less goes first; a whole block takes along what is inside.
    5. What the branch computes for others too (a position bias, keys and values that are returned) stays.

    Refused, with the reason: a shortcut of another shape or type than the sum, subtracted or scaled; a branch whose
    result is read elsewhere; memory written in place that others read; what `only`, `skip` and `kinds` say; and each
    branch that contributes more than those that go. Where fewer can go than are asked for, the plan says how many
    went; where none can, `blocks` is an error.
    """

    name = "drop_blocks"
    options_type = DropBlocksOptions
    plan_type = DropBlocksPlan
    cached = True

    def plan(self, program: Program, ctx: Context) -> DropBlocksPlan:
        """Measure every branch and choose the ones that go.

        Raises:
            UsageError: a glob of `only` or `skip` matches no branch.
            PassError: `blocks` is given and no branch can go.
            DataError: the criterion needs data and there is none.
        """
        found, refused = find_branches(program.graph_module)
        can_go = [branch.name for branch in found]
        check_globs("only", self.options.only, can_go, kind="branch that can go")
        others = [refusal.site for refusal in refused]
        check_globs("skip", self.options.skip, can_go, kind="branch that can go", others=others)
        allowed, kept = self._allowed(found)
        asked = self._asked(len(allowed))
        options = self.options
        most = len(allowed) if asked is None else min(asked, len(allowed))
        limits = Limits(most, options.sqnr, options.samples, options.rescore)
        search = Search(program, ctx, options.criterion, limits, allowed, self.name)
        search.run()
        left = [self._why_left(branch, search) for branch in found if branch.key in allowed]
        refusals = [*refused, *kept.values(), *(refusal for refusal in left if refusal)]
        if not found and not refused:
            none = "it has no residual branch: no sum one side of which is computed from the other alone"
            refusals.append(Refusal("the program", none))
        if asked is not None and len(search.dropped) < asked:
            refusals.append(_fewer(len(search.dropped), asked, refusals))
        names = {branch.key: branch.name for branch in found}
        plan = self.new_plan(
            sites=[branch.name for branch in found if branch.key in search.dropped],
            refusals=refusals,
            asked=asked,
            dropped=tuple(str(entry["result"]) for entry in search.dropped.values()),
            blocks={names[key]: entry for key, entry in search.dropped.items()},
            measured={names[key]: _finite(score) for key, score in search.scores.items()},
        )
        logger.info("drop_blocks: %s", plan.summary())
        return plan

    def apply(self, program: Program, plan: DropBlocksPlan) -> Program:
        """Take out the branches one after the other.

        Raises:
            PassError: the plan was made for another program.
        """
        return without(program, plan.dropped, self.name)

    def _allowed(self, found: Sequence[Branch]) -> tuple[set[str], dict[str, Refusal]]:
        """Return the keys of the branches that may go, and by key why others may not."""
        kept: dict[str, Refusal] = {}
        for branch in found:
            reason = self._why_kept(branch)
            if reason:
                kept[branch.key] = Refusal(branch.name, *reason)
        for branch in found:
            held = [other for other in found if branch.holds(other) and self._skipped(other)]
            if held and branch.key not in kept:
                kept[branch.key] = Refusal(branch.name, f"`{held[0].name}` inside it is named in skip")
        return {branch.key for branch in found} - set(kept), kept

    def _why_kept(self, branch: Branch) -> tuple[str, str] | None:
        if self._skipped(branch):
            return "named in skip", ""
        if self.options.only and not any(is_named(branch.name, glob) for glob in self.options.only):
            return "not named in only", ""
        if branch.kind not in self.options.kinds:
            return f"kind `{branch.kind}` is not in kinds", "kind not chosen"
        return None

    def _skipped(self, branch: Branch) -> bool:
        return any(is_named(branch.name, glob) for glob in self.options.skip)

    def _asked(self, available: int) -> int | None:
        """Return how many branches are to go, None where `sqnr` says."""
        if self.options.sqnr is not None:
            return None
        if self.options.blocks is not None:
            return self.options.blocks
        ratio = DEFAULT_RATIO if self.options.ratio is None else self.options.ratio
        return min(available, max(1, math.floor(exact(ratio) * available)))

    def _why_left(self, branch: Branch, search: Search) -> Refusal | None:
        """Return why a branch that could have gone has not; None if it has, or went with the block around it."""
        key = branch.key
        if key in search.blocked:
            return Refusal(branch.name, search.blocked[key])
        if key not in search.left:
            gone = key in search.dropped or search.took(branch)
            return None if gone else Refusal(branch.name, "its layers went with the branches inside it")
        if search.over_limit is not None:
            reason = f"without another branch the outputs are {search.over_limit:.1f} dB from the original's"
            return Refusal(branch.name, reason, "the outputs would be further off than sqnr")
        if self.options.criterion in ("random", "last"):
            return Refusal(
                branch.name, f"not among the {len(search.dropped)} that go by criterion={self.options.criterion}"
            )
        score = search.scores[key]
        return Refusal(
            branch.name, f"it contributes {score:.3g}, more than what goes", "it contributes more than what goes"
        )


def _fewer(went: int, asked: int, refusals: Sequence[Refusal]) -> Refusal:
    """Say that fewer branches went than were asked for.

    Raises:
        PassError: none went.
    """
    counts = Counter(refusal.counted_as for refusal in refusals).most_common()
    reasons = f" ({', '.join(f'{count} x {reason}' for reason, count in counts)})" if counts else ""
    if not went:
        raise PassError(
            f"Pass `drop_blocks` cannot drop {asked} {'branches' if asked > 1 else 'branch'}: none of this model can "
            f"go{reasons}. The plan of `drop_blocks:ratio=0.1` names each."
        )
    return Refusal("the program", f"{asked} branches were asked for and {went} went, as no other can go{reasons}")


def _finite(score: float) -> float | None:
    return score if math.isfinite(score) else None
