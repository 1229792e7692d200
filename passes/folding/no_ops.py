"""Drop calls that return their input unchanged.

    y = dropout(x), eval        identity(x)         contiguous(x), clone(x), to(x, its own dtype), detach(x)
    x + 0, x * 1, x / 1         view, expand, permute, slice, pad, roll, ... that change nothing
    adaptive_avg_pool(x) to the size x has

A call goes only if its result has the shape, dtype, strides and device of its input, so that nothing behind it can
see the difference, and, where it would have made a copy, only if nobody writes to either side of it. Left alone: a
value that is an input (or a weight) and an output of the program at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.ir.aliasing import Storages
from graphopt.ir.editor import Editor
from graphopt.ir.graph import arguments
from graphopt.ir.operators import (
    ADAPTIVE_AVERAGE_POOLS,
    AVERAGE_POOLS,
    CASTS,
    COPIES,
    DIVISIONS,
    DROPOUTS,
    EXPANSIONS,
    MAX_POOLS,
    MULTIPLICATIONS,
    REORDERS,
    RESHAPES,
    SUMS,
    VIEWS,
    Family,
    writes_in_place,
)
from graphopt.ir.program import Program
from graphopt.passes.folding.likeness import indistinguishable
from graphopt.passes.layers.reordering import axes_before
from graphopt.pipeline.plan import Refusal

aten = torch.ops.aten
Given = Mapping[str, Any]
Test = Callable[[Given, torch.Tensor], bool]  # arguments by name, the value of the input


def _always(given: Given, value: torch.Tensor) -> bool:
    """Same shape and dtype is enough."""
    return True


def _not_training(given: Given, value: torch.Tensor) -> bool:
    return not given.get("train", given.get("training", False)) or given.get("p") == 0


def _keeps_its_axes(given: Given, value: torch.Tensor) -> bool:
    """Whether no axis that may go has a size that depends on data, and may be one."""
    dim = given.get("dim", range(value.dim()))
    return not any(isinstance(value.shape[axis], torch.SymInt) for axis in ([dim] if isinstance(dim, int) else dim))


def _whole_axis(given: Given, value: torch.Tensor) -> bool:
    return given["start"] in (None, 0) and given["step"] == 1


def _no_padding(given: Given, value: torch.Tensor) -> bool:
    return not any(given["pad"])


def _no_shift(given: Given, value: torch.Tensor) -> bool:
    return not any(given["shifts"])


def _no_axes(given: Given, value: torch.Tensor) -> bool:
    return not given["dims"]


def _adds_zero(given: Given, value: torch.Tensor) -> bool:
    return _is_number(given["other"]) and given["other"] * given.get("alpha", 1) == 0


def _times_one(given: Given, value: torch.Tensor) -> bool:
    return _is_number(given["other"]) and given["other"] == 1


def _to_the_first(given: Given, value: torch.Tensor) -> bool:
    return _is_number(given["exponent"]) and given["exponent"] == 1


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _alone(given: Given, value: torch.Tensor) -> bool:
    return len(given["tensors"]) == 1


def _unit_window(given: Given, value: torch.Tensor) -> bool:
    def all_are(name: str, wanted: int) -> bool:
        return all(size == wanted for size in given.get(name) or [wanted])

    return (
        all_are("kernel_size", 1)
        and all_are("stride", 1)
        and all_are("padding", 0)
        and given.get("divisor_override") in (None, 1)
    )


# operators -> when they return their input, given that shape, dtype, strides and device are those of the input
_TESTS: Sequence[tuple[Family, Test]] = (
    (DROPOUTS, _not_training),
    (Family("squeeze"), _keeps_its_axes),
    (COPIES | CASTS | RESHAPES | EXPANSIONS | ADAPTIVE_AVERAGE_POOLS | Family("view.dtype", "narrow"), _always),
    (AVERAGE_POOLS | MAX_POOLS, _unit_window),
    (SUMS, _adds_zero),
    (MULTIPLICATIONS | DIVISIONS, _times_one),
    (Family("slice"), _whole_axis),
    (Family("pad", "constant_pad_nd"), _no_padding),
    (Family("roll"), _no_shift),
    (Family("flip"), _no_axes),
    (Family("pow"), _to_the_first),
    (Family("cat"), _alone),
)


def find_no_ops(program: Program) -> tuple[list[str], list[Refusal]]:
    """List the calls that can go, and those that return their input and must stay."""
    storages = Storages(program.graph)
    found: list[str] = []
    refusals: list[Refusal] = []
    gone: set[fx.Node] = set()
    for node in program.graph.nodes:
        source = _returned_input(node)
        if source is None:
            if _is_settled_check(node):
                found.append(node.name)
            continue
        reason = _why_it_stays(node, source, storages, gone)
        if reason:
            refusals.append(Refusal(node.name, reason))
        else:
            found.append(node.name)
            gone.add(node)
    return found, refusals


def drop_no_ops(program: Program, names: Sequence[str]) -> Program:
    """Let the users of every named call read its input instead.

    Raises:
        PassError: one does not return its input here.
    """
    program = program.copy()
    editor = Editor(program.graph_module, "fold")
    nodes = {node.name: node for node in program.graph.nodes}
    for name in names:
        node = nodes[name]
        if not _is_settled_check(node):
            source = _returned_input(node)
            if source is None:
                raise PassError(f"The plan drops `{name}`, which does something in this program. Make the plan again.")
            node.replace_all_uses_with(source)
        editor.graph.erase_node(node)
    return program.with_graph(editor.finish())


def _returned_input(node: fx.Node) -> fx.Node | None:
    """Return the input that `node` returns unchanged."""
    source = None if writes_in_place(node) else _first_tensor(node)
    if source is None or not indistinguishable(source, node):
        return None
    if node in REORDERS:
        return source if axes_before(node, source) == list(range(source.meta["val"].dim())) else None
    test = next((test for family, test in _TESTS if node in family), None)
    if test is None:
        return None
    return source if test(arguments(node, ()), source.meta["val"]) else None


def _first_tensor(node: fx.Node) -> Any:
    first = node.args[0] if node.args else None
    if isinstance(first, list | tuple):
        first = first[0] if first else None
    return first if isinstance(first, fx.Node) else None


def _why_it_stays(node: fx.Node, source: fx.Node, storages: Storages, gone: set[fx.Node]) -> str:
    if node not in VIEWS or not node.target.is_view:  # type: ignore[union-attr]  # a copying twin is none
        writes = [*storages.writes(source), *storages.writes(node)]
        if writes:
            return f"it may be a copy, and `{writes[0].name}` writes to one side of it"
    while source in gone:
        source = _first_tensor(source)
    if source.op in ("placeholder", "get_attr") and any(user.op == "output" for user in node.users):
        return f"it hands `{source.name}` straight to an output of the program"
    return ""


def _is_settled_check(node: fx.Node) -> bool:
    """Whether `node` only asserts what capture has already settled: dtype, device and layout of a value."""
    return node.target is aten._assert_tensor_metadata.default and not node.users
