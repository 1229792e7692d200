"""Prove every operator of torch by itself: take indices from whatever its rule leaves free, compare with masking.

    python tools/zoo_operators.py
    python tools/zoo_operators.py --only 'nn.functional.*' --samples 20 --verbose

torch tests its operators on sample inputs of every shape and option (`op_db`). Each sample becomes a program: its
floating-point tensors are parameters, and every dimension of every result is contracted with another one, so that
each dimension can be followed from a weight to a weight. Half of the indices of every axis that is free go, and
masked equivalence is proved. A row says how many samples were exact, which kept every axis (with the reason that
holds most of them) and which operators had no rule; `wrong` and `failed` must stay at 0.
"""

from __future__ import annotations

import collections
import fnmatch
import random
import sys
import types
import unittest
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphopt.axes.infer import Axes, infer
from graphopt.axes.layout import leaves
from graphopt.axes.proof.masked import check_masked_equivalence
from graphopt.axes.proof.value import CannotProveError
from graphopt.axes.rewrite import remove, slices
from graphopt.capturing.normal_form import normalise
from graphopt.errors import VerifyError

_WIDTH = 2  # of what each dimension of a result is contracted to
# What these hold is nobody's business, and half precision cannot be multiplied with double.
_MEANINGLESS = ("empty_like", "new_empty", "new_empty_strided", "empty_strided", "empty_permuted", "resize_", "chalf")
_SCALES = (1.0, 0.37, -0.6, 2.5)  # arguments in some of these ranges are in the domain of every operator


class Applied(nn.Module):
    """Calls an operator on parameters scaled by the input and contracts every dimension of its results."""

    def __init__(self, operator: Callable[..., Any], arguments: Any) -> None:
        super().__init__()
        self.operator = operator
        self.leaves, self.spec = pytree.tree_flatten(arguments)
        for index, leaf in enumerate(self.leaves):
            if _floating(leaf):
                self.register_parameter(f"given{index}", nn.Parameter(leaf.detach().clone(), requires_grad=False))
            elif isinstance(leaf, Tensor):
                self.register_buffer(f"given{index}", leaf.detach().clone())
        self.shapes: list[tuple[int, ...]] = []
        with torch.no_grad():
            for number, result in enumerate(self._results(torch.ones((), dtype=torch.float64))):
                for d, length in enumerate(result.shape):
                    self.register_parameter(f"after{number}_{d}", _weight(length))

    def _results(self, scale: Tensor) -> list[Tensor]:
        given = [
            getattr(self, f"given{i}") * scale
            if _floating(leaf)
            else (getattr(self, f"given{i}") if isinstance(leaf, Tensor) else leaf)
            for i, leaf in enumerate(self.leaves)
        ]
        args, kwargs = pytree.tree_unflatten(given, self.spec)
        found = [leaf for leaf in pytree.tree_leaves(self.operator(*args, **kwargs)) if isinstance(leaf, Tensor)]
        return [leaf for leaf in found if leaf.dim() and leaf.numel() and not leaf.is_sparse]

    def forward(self, scale: Tensor) -> list[Tensor]:
        outputs = []
        for number, result in enumerate(self._results(scale)):
            x = torch.view_as_real(result).sum(-1) if result.is_complex() else result.double()
            for d in range(result.dim()):
                x = torch.movedim(x, 0, -1) @ getattr(self, f"after{number}_{d}")
            outputs.append(x)
        return outputs


def _weight(length: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(length, _WIDTH, dtype=torch.float64), requires_grad=False)


def _floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


@dataclass(slots=True)
class Row:
    """What was found out about one operator."""

    name: str
    verdicts: collections.Counter[str] = field(default_factory=collections.Counter)
    free: int = 0
    axes: int = 0
    reasons: collections.Counter[str] = field(default_factory=collections.Counter)
    unknown: dict[str, None] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


def examine(row: Row, operator: Callable[..., Any], arguments: Any, seed: int) -> None:
    """Prune one sample and prove it; count what happened."""
    try:
        with torch.no_grad():
            module = Applied(operator, arguments)
            exported = torch.export.export(module, (torch.ones((), dtype=torch.float64),), strict=False)
            gm = normalise(exported.module(check_guards=False))  # type: ignore[arg-type]
    except Exception as err:  # what torch cannot export no program holds
        row.verdicts["no program"] += 1
        row.messages.append(f"no program: {str(err).splitlines()[0][:150] if str(err) else type(err).__name__}")
        return
    if not any(True for _ in module.parameters()):
        row.verdicts["nothing to follow"] += 1
        return
    if any(torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) for node in gm.graph.nodes):
        row.verdicts["random"] += 1
        return
    try:
        _prove(row, gm, random.Random(seed))
    except CannotProveError as err:
        row.verdicts["cannot prove"] += 1
        row.messages.append(f"cannot prove: {err}")
    except VerifyError as err:
        kind = "not a number" if "proves nothing" in str(err) else "wrong"
        row.verdicts[kind] += 1
        row.messages.append(f"{kind}: {err}")
    except Exception as err:  # one row of the table: whatever went wrong is the finding
        row.verdicts["failed"] += 1
        row.messages.append(f"failed: {type(err).__name__}: {err}")


def _prove(row: Row, gm: fx.GraphModule, draw: random.Random) -> None:
    axes = infer(gm)
    row.unknown.update(dict.fromkeys(axes.unknown))
    kept = {}
    for axis, length in _given_axes(axes).items():
        row.axes += 1
        if axis in axes.frozen:
            row.reasons[axes.frozen[axis].split(" (`")[0]] += 1
        else:
            row.free += 1
            kept[axis] = sorted(draw.sample(range(length), (length + 1) // 2))
    if not kept:
        row.verdicts["whole"] += 1
        return
    pruned = remove(gm, axes, kept)
    for attempt, scale in enumerate(_SCALES):
        try:
            check_masked_equivalence(gm, pruned, slices(axes, kept), (torch.tensor(scale, dtype=torch.float64),))
            break
        except VerifyError as err:
            if "proves nothing" not in str(err) or attempt == len(_SCALES) - 1:
                raise
    row.verdicts["exact"] += 1


def _given_axes(axes: Axes) -> dict[int, int]:
    """Return the size of every axis of at least two indices that a tensor of the sample carries."""
    found: dict[int, int] = {}
    for name, dims in axes.parameters.items():
        if name.startswith("given"):
            for layout in dims:
                found.update({a.id: a.size for a in leaves(layout) if isinstance(a.size, int) and a.size > 1})
    return found


def described_by_torch() -> Sequence[Any]:
    """Return torch's descriptions of its operators."""
    stub = types.ModuleType("expecttest")  # imported by torch's tests, of no use here
    stub.TestCase = unittest.TestCase  # type: ignore[attr-defined]
    sys.modules.setdefault("expecttest", stub)
    from torch.testing._internal.common_methods_invocations import op_db

    return op_db  # type: ignore[no-any-return]


def operators() -> Iterator[Any]:
    """Yield those descriptions whose operators can be examined."""
    for info in described_by_torch():
        if torch.float64 in info.supported_dtypes("cpu") and info.name not in _MEANINGLESS:
            yield info


def variants(info: Any) -> dict[str, Callable[..., Any]]:
    """Return the function, the method and the in-place method of an operator, where they exist."""
    found = {"": info.op, ".method": info.method_variant, ".in_place": None}
    if info.inplace_variant is not None:

        def in_place(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return info.inplace_variant(x.clone(), *args, **kwargs)

        found[".in_place"] = in_place
    return {suffix: operator for suffix, operator in found.items() if operator is not None}


def survey(info: Any, samples: int, every_variant: bool) -> list[Row]:
    """Examine samples of one operator, spread over all that torch has."""
    rows = []
    for suffix, operator in variants(info).items():
        if suffix and not every_variant:
            continue
        row = Row(f"{info.name}{'.' + info.variant_test_name if info.variant_test_name else ''}{suffix}")
        torch.manual_seed(0)
        every = [s for s in info.sample_inputs("cpu", torch.float64) if not (suffix and isinstance(s.input, list))]
        step = max(1, len(every) // samples)
        for number, sample in enumerate(every[::step][:samples]):
            examine(row, operator, ((sample.input, *sample.args), sample.kwargs), number)
        rows.append(row)
    return rows


def main(
    only: Annotated[str, typer.Option(help="names to run, as a glob")] = "*",
    samples: Annotated[int, typer.Option(help="samples of each operator", min=1)] = 6,
    every_variant: Annotated[bool, typer.Option(help="methods and in-place methods too")] = False,
    verbose: Annotated[bool, typer.Option(help="say why")] = False,
) -> None:
    """Examine torch's operators and print a table."""
    warnings.simplefilter("ignore")
    infos = [info for info in operators() if fnmatch.fnmatchcase(info.name, only)]
    console = Console(width=170)
    rows = [row for info in track(infos, console=Console(stderr=True)) for row in survey(info, samples, every_variant)]
    console.print(_table(rows))
    if verbose:
        for row in rows:
            for message in dict.fromkeys(row.messages):
                console.print(f"{row.name}: {message}", markup=False, highlight=False)
    total: collections.Counter[str] = sum((row.verdicts for row in rows), collections.Counter())
    console.print(dict(total.most_common()), f"{len(rows)} operators")
    raise typer.Exit(1 if total["wrong"] or total["failed"] else 0)


def _table(rows: list[Row]) -> Table:
    table = Table()
    for column in ("operator", "samples", "free axes", "without rule", "what holds the others"):
        table.add_column(column)
    for row in rows:
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in row.verdicts.most_common())
        reason = ", ".join(f"{count} {text}" for text, count in row.reasons.most_common(2))
        bad = row.verdicts["wrong"] or row.verdicts["failed"] or row.unknown
        style = "red" if bad else ""
        table.add_row(row.name, verdicts, f"{row.free} / {row.axes}", ", ".join(row.unknown), reason, style=style)
    return table


if __name__ == "__main__":
    typer.run(main)
