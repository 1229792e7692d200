"""Calls that fail where torch would read beyond memory: what two operators take fits together, in every call.

lstm(x, [zeros(2, n, 8), ..], ..)      lstm(expand(x, -1, n, 4), [zeros(2, n, 8), ..], ..)
lstm(x, [h, c], ..)                    n = x.size(1)
                                       lstm(expand(x, -1, n, 4), [expand(h, 2, n, 8), expand(c, 2, n, 8)], ..)
embedding_bag(w, indices, o, ..)       o = cummax(o); embedding_bag(w, indices, select_scatter(o, o[0], 0, 0), ..)
div(x, y, "trunc")                     see `ir/divisions`

torch 2.13 compares neither the input of an LSTM with its weights and states, nor asks whether there is a bag at all and
whether one follows the other. The values stay what they are; offsets are copied. A lowering takes the guards of the
first two out again: runtimes check by themselves.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphopt.capturing.fixed_shapes import FixedShapes, fixed_shapes
from graphopt.ir.divisions import rounded_towards_zero, rounds_towards_zero
from graphopt.ir.editor import Editor
from graphopt.ir.graph import arguments, erase_dead
from graphopt.ir.operators import writes_in_place
from graphopt.ir.regions import every_graph_module, graph_modules
from graphopt.ir.torch_internals import OpOverload
from graphopt.ir.training import set_argument

aten = torch.ops.aten

_MADE = (aten.zeros.default, aten.ones.default, aten.full.default)
_MADE_OF = (aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.expand.default)
_BAGS = (
    *(aten.embedding_bag.default, aten.embedding_bag.padding_idx),
    *(aten._embedding_bag.default, aten._embedding_bag_forward_only.default),
)


def insert_guards(gm: fx.GraphModule) -> None:
    """Guard LSTMs, bags and divisions that round, in place, in the bodies of regions too; guarded ones stay."""
    calm = not any(writes_in_place(node) for body in every_graph_module(gm) for node in body.graph.nodes)
    for fixed in fixed_shapes(gm):
        graph = fixed.gm.graph
        editor: Editor | None = None
        guarded = [
            node for node in graph.nodes if node.target in (aten.lstm.input, *_BAGS) or rounds_towards_zero(node)
        ]
        for node in guarded:
            with graph.inserting_before(node):
                if node.target is aten.lstm.input:
                    _tie_states(node, fixed)
                elif rounds_towards_zero(node):
                    editor = editor or Editor(fixed.gm, "capture")
                    editor.replace(node, rounded_towards_zero(node, editor))
                else:
                    _ask_for_bags(node, believed=calm)
        if guarded:
            fixed.gm.recompile()


def take_out_guards(gm: fx.GraphModule) -> None:
    """Let guarded calls of its graphs read what their guards read, in place, in the bodies of regions too."""
    for body in graph_modules(gm):
        for node in body.graph.nodes:
            if node.target is aten.lstm.input:
                _replace_arguments(node, ("input", "hx"), _unexpanded)
            elif node.target in _BAGS:
                _replace_arguments(node, ("offsets",), _unasked)
        erase_dead(body.graph)


def _replace_arguments(node: fx.Node, names: tuple[str, ...], replaced: Callable[[fx.Node], Any]) -> None:
    for name, value in arguments(node, names).items():
        set_argument(node, name, fx.map_arg(value, replaced))


def _unexpanded(value: fx.Node) -> Any:
    source: Any = arguments(value, ())["self"] if value.target is aten.expand.default else value
    return source if source.meta["val"].shape == value.meta["val"].shape else value


def _unasked(offsets: fx.Node) -> Any:
    source = _asked(offsets, 0) or _asked(offsets, 1)
    return offsets if source is None else _unasked(source)


def _ask_for_bags(node: fx.Node, *, believed: bool) -> None:
    """Guard a bag, unless it is guarded; that is not `believed` where anything is written to, maybe to the guard."""
    given = arguments(node, ("offsets", "include_last_offset"))
    offsets, last = given["offsets"], 1 if given["include_last_offset"] else 0
    if believed and _asked(offsets, last) is not None:
        return
    both = node.graph.call_function(aten.cummax.default, (offsets, 0))
    rising = node.graph.call_function(operator.getitem, (both, 0))
    first = node.graph.call_function(aten.select.int, (rising, 0, last))
    asked = node.graph.call_function(aten.select_scatter.default, (rising, first, 0, last))
    if isinstance(value := offsets.meta.get("val"), torch.Tensor) and value.dim() == 1:
        values = (value, value.to(torch.int64)), value, value.new_empty(()), value
        for made, its in zip((both, rising, first, asked), values, strict=True):
            made.meta = {**offsets.meta, "val": its}
    set_argument(node, "offsets", asked)


def _asked(value: fx.Node, last: int) -> fx.Node | None:
    """Return the offsets that `_ask_for_bags` has made a value of, None where it has not."""
    if value.target is not aten.select_scatter.default or len(value.args) != 4:
        return None
    rising, first, *where = value.args
    both = rising.args[0] if isinstance(rising, fx.Node) and rising.target is operator.getitem else None
    if not isinstance(both, fx.Node) or both.target is not aten.cummax.default:
        return None
    made = isinstance(first, fx.Node) and first.target is aten.select.int and first.args == (rising, 0, last)
    whole = rising.args[1] == 0 and both.args[1] == 0 and where == [0, last]  # type: ignore[union-attr]
    return both.args[0] if made and whole and isinstance(both.args[0], fx.Node) else None


def _tie_states(node: fx.Node, fixed: FixedShapes) -> None:
    given = arguments(node, ())
    x, batch = given["input"], 0 if given["batch_first"] else 1
    first, second, *_ = map(fixed.of, given["params"])
    if first is None or second is None:  # a model in memory may compute them; in a file's the check has refused that
        return
    layers = given["num_layers"] * (2 if given["bidirectional"] else 1)
    wanted = [(layers, second[1]), (layers, first[0] // 4)]
    counts = [_count(state, sizes) for state, sizes in zip(given["hx"], wanted, strict=True)]
    count = counts[0]
    if count is None or count != counts[1]:
        count = node.graph.call_function(aten.sym_size.int, (x, batch))
        if isinstance(value := x.meta.get("val"), torch.Tensor) and value.dim() == 3:
            count.meta["val"] = value.shape[batch]
        states = [_expanded(h, [one, count, last]) for h, (one, last) in zip(given["hx"], wanted, strict=True)]
        set_argument(node, "hx", states)
    set_argument(node, "input", _expanded(x, [count, -1, first[1]] if batch == 0 else [-1, count, first[1]]))


def _count(state: fx.Node, wanted: tuple[int, int]) -> Any:
    """Return how many samples a state is made for, None where it is not made here of the other sizes wanted."""
    if state.target not in (*_MADE, *_MADE_OF):
        return None
    sizes = arguments(state, ("size",))["size"]
    if not isinstance(sizes, list | tuple) or len(sizes) != 3 or (sizes[0], sizes[2]) != wanted:
        return None
    size = _is_size(sizes[1]) or (isinstance(sizes[1], int) and sizes[1] >= 0)
    return sizes[1] if size or state.target is not aten.expand.default else None  # which takes -1 for any


def _is_size(value: object) -> bool:
    return isinstance(value, fx.Node) and value.target is aten.sym_size.int


def _expanded(value: fx.Node, sizes: list[Any]) -> fx.Node:
    if value.target is aten.expand.default:
        own = arguments(value, ("size",))["size"]
        if isinstance(own, list | tuple) and list(own) == sizes:
            return value
    return _like(aten.expand.default, value, sizes)


def _like(target: OpOverload, value: fx.Node, *args: Any) -> fx.Node:
    made = value.graph.call_function(target, (value, *args))
    made.meta = dict(value.meta)
    return made
